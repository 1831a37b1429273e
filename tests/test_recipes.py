"""Every shipped recipe, parsed by the real command, holds the published settings (paper and official release)."""

import re

import pytest
from jsonargparse import auto_parser

from convmae.cli import recipes
from convmae.commands.pretrain import pretrain

PAPER = [name for name in recipes() if name.startswith("base_")]


def parsed(name, *flags):
    parser = auto_parser(pretrain, as_positional=False)
    return parser.instantiate(parser.parse_args(["--config", str(recipes()[name]), "--data", "photos", *flags]))


def test_all_of_the_paper_s_schedules_ship():
    schedules = {f"base_{epochs}ep{form}" for epochs in (200, 400, 800, 1600) for form in ("", "_single_scale")}
    assert set(PAPER) == schedules | {"base_50ep_complementary"}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_hold_the_published_settings(name):
    options = parsed(name)
    epochs = int(re.search(r"(\d+)ep", name)[1])
    complementary = name.endswith("complementary")
    assert options.model == "base"
    assert options.epochs == epochs
    assert options.batch_size == (512 if complementary else 2048)
    assert options.optimizer.base_lr == (6e-4 if complementary else 1.5e-4)
    assert options.optimizer.warmup_epochs == (10 if complementary else 40)
    assert options.optimizer.min_lr == 0
    assert options.optimizer.weight_decay == 0.05
    assert options.optimizer.betas == (0.9, 0.95)
    assert options.optimizer.clip_grad is None
    assert options.mask_ratio == 0.75
    assert options.complementary_sets == (4 if complementary else 0)
    assert options.multi_scale is not name.endswith("single_scale")
    assert options.norm_pix is True
    assert options.image_size == 224
    assert tuple(options.crop_scale) == (0.2, 1.0)
    assert options.kernel_size == 5


def test_flags_override_a_recipe():
    options = parsed("base_200ep", "--epochs", "3", "--optimizer.base_lr", "0.1")
    assert options.epochs == 3
    assert options.optimizer.base_lr == 0.1
    assert options.batch_size == 2048


def test_the_demo_parses():
    assert parsed("demo").model == "tiny"
