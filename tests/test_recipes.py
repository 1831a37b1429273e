"""Every shipped recipe, parsed by the real command, holds the published settings (paper and official release)."""

import re

import pytest
import yaml
from jsonargparse import auto_parser

from convmae.cli import recipes
from convmae.commands.detect import train as train_detector
from convmae.commands.finetune import finetune
from convmae.commands.pretrain import pretrain
from convmae.commands.probe import probe
from convmae.commands.segment import train as train_segmenter
from convmae.training.folder import plain_settings

COMMANDS = {
    **dict.fromkeys([f"base_{epochs}ep" for epochs in (200, 400, 800, 1600)], pretrain),
    **dict.fromkeys([f"base_{epochs}ep_single_scale" for epochs in (200, 400, 800, 1600)], pretrain),
    "base_50ep_complementary": pretrain,
    "demo": pretrain,
    "finetune_base_100ep": finetune,
    "probe_base_90ep": probe,
    "detect_base_25ep": train_detector,
    "detect_base_25ep_vitdet": train_detector,
    "detect_demo": train_detector,
    "segment_base_160k": train_segmenter,
    "segment_demo": train_segmenter,
}
"""Which command each recipe is for."""

PAPER = [name for name in recipes() if name.startswith("base_")]


def parsed(name, *flags, command=pretrain):
    parser = auto_parser(command, as_positional=False)
    return parser.instantiate(parser.parse_args(["--config", str(recipes()[name]), "--data", "photos", *flags]))


def test_no_recipe_is_forgotten():
    """Neither by the table above nor by the package, which has one file for each."""
    assert recipes().keys() == COMMANDS.keys()
    assert {path.name for path in next(iter(recipes().values())).parent.iterdir()} == {
        f"{name}.yaml" for name in COMMANDS
    }


@pytest.mark.parametrize(("name", "command"), COMMANDS.items())
def test_a_recipe_is_taken_by_its_command_and_all_that_it_says_holds(name, command):
    """Read by YAML alone, and by the command."""
    options = parsed(name, *(["--weights", "run"] if command is probe else []), command=command)

    def holds(said, taken):
        for key, value in said.items():
            found = getattr(taken, key)
            if isinstance(value, dict):
                holds(value, found)
            else:
                assert plain_settings(found) == value, key

    said = yaml.safe_load(recipes()[name].read_text())
    assert said
    holds({key: value for key, value in said.items() if key != "data"}, options)


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


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.endswith("demo")])
def test_demos_are_of_the_tiny_model(name):
    assert parsed(name, command=COMMANDS[name]).model == "tiny"


def test_fine_tuning_holds_the_published_settings():
    options = parsed("finetune_base_100ep", command=finetune)
    assert (options.model, options.epochs, options.batch_size, options.image_size) == ("base", 100, 1024, 224)
    assert options.drop_path == 0.1
    optimizer, augmentation = options.optimizer, options.augmentation
    assert (optimizer.base_lr, optimizer.warmup_epochs, optimizer.min_lr) == (5e-4, 5, 1e-6)
    assert (optimizer.weight_decay, optimizer.betas, optimizer.layer_decay) == (0.05, (0.9, 0.999), 0.65)
    assert optimizer.clip_grad is None
    assert augmentation.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (augmentation.random_erasing, augmentation.label_smoothing) == (0.25, 0.1)
    assert (augmentation.mixup, augmentation.cutmix) == (0.8, 1.0)


def test_the_linear_probe_holds_the_published_settings():
    options = parsed("probe_base_90ep", "--weights", "run", command=probe)
    assert (options.form, options.epochs, options.batch_size, options.image_size) == ("published", 90, 4096, 224)
    optimizer = options.optimizer
    assert (optimizer.base_lr, optimizer.warmup_epochs, optimizer.min_lr, optimizer.momentum) == (0.1, 10, 0, 0.9)


def iterations(warmup_epochs, batch):
    """Of a warm-up on COCO's 118,287 training images."""
    return round(warmup_epochs * (118_287 // batch))


def test_the_detector_holds_the_published_settings():
    options = parsed("detect_base_25ep", command=train_detector)
    assert (options.model, options.form, options.epochs, options.batch_size) == ("base", "paper", 25, 32)
    assert (options.image_size, options.drop_path) == (1024, 0.1)
    assert (tuple(options.jitter.scale), options.jitter.flip) == ((0.1, 2.0), 0.5)
    optimizer = options.optimizer
    assert optimizer.base_lr * 32 / 256 == pytest.approx(8e-5)
    assert (optimizer.weight_decay, optimizer.layer_decay, optimizer.schedule) == (0.1, 1.0, "cosine")
    assert iterations(optimizer.warmup_epochs, 32) == 461
    assert (options.window, options.anchor_sizes) == (None, None)  # the form's


def test_vitdet_s_detector_holds_the_published_settings():
    options = parsed("detect_base_25ep_vitdet", command=train_detector)
    assert (options.model, options.form, options.batch_size, options.image_size) == ("base", "vitdet", 16, 1024)
    optimizer = options.optimizer
    assert optimizer.base_lr * 16 / 256 == pytest.approx(1e-4)
    assert (optimizer.weight_decay, optimizer.layer_decay, optimizer.schedule) == (0.1, 0.8, "steps")
    assert iterations(optimizer.warmup_epochs, 16) == 250
    assert [round(share * 184_375) for share in optimizer.steps_at] == pytest.approx([163_889, 177_546], abs=3)
    assert options.epochs * (118_287 // 16) == pytest.approx(184_375, rel=0.003)


def test_the_detector_s_defaults_are_the_paper_s():
    parser = auto_parser(train_detector, as_positional=False)
    defaults = parser.instantiate(parser.parse_args(["--data", "photos"]))
    published = parsed("detect_base_25ep", command=train_detector)
    for name in ("epochs", "batch_size", "drop_path", "jitter"):
        assert getattr(defaults, name) == getattr(published, name)
    for name in ("base_lr", "weight_decay", "betas", "layer_decay", "schedule", "min_lr"):
        assert getattr(defaults.optimizer, name) == getattr(published.optimizer, name)


def test_the_segmenter_holds_the_published_settings():
    """160,000 iterations on ADE20K's 20,210 training images, of which an epoch has 1263 of whole batches."""
    options = parsed("segment_base_160k", command=train_segmenter)
    assert (options.model, options.batch_size, options.image_size, options.drop_path) == ("base", 16, 512, 0.2)
    steps_per_epoch = 20_210 // 16
    assert steps_per_epoch == 1263
    assert options.epochs * steps_per_epoch == pytest.approx(160_000, rel=0.003)
    variation = options.variation
    assert (tuple(variation.scale), variation.largest_share, variation.flip) == ((0.5, 2.0), 0.75, 0.5)
    assert variation.distortion == 0.5
    optimizer = options.optimizer
    assert optimizer.base_lr * 16 / 256 == pytest.approx(1e-4)
    assert (optimizer.weight_decay, tuple(optimizer.betas), optimizer.layer_decay) == (0.05, (0.9, 0.999), 0.75)
    assert (optimizer.power, optimizer.min_lr, optimizer.clip_grad) == (1.0, 0.0, None)
    assert round(optimizer.warmup_epochs * steps_per_epoch) == 1500
    inference = options.inference
    assert (inference.whole, inference.window, inference.stride) == (False, 512, 341)
    assert (inference.shorter_side or options.image_size, tuple(inference.scales), inference.flip) == (
        512,
        (1.0,),
        False,
    )


def test_the_segmenter_s_defaults_are_the_paper_s():
    parser = auto_parser(train_segmenter, as_positional=False)
    defaults = parser.instantiate(parser.parse_args(["--data", "photos"]))
    published = parsed("segment_base_160k", command=train_segmenter)
    for name in ("model", "epochs", "batch_size", "drop_path", "variation"):
        assert getattr(defaults, name) == getattr(published, name)
    for name in ("base_lr", "weight_decay", "betas", "layer_decay", "power", "min_lr", "clip_grad"):
        assert getattr(defaults.optimizer, name) == getattr(published.optimizer, name)
    for name in ("whole", "scales", "flip"):
        assert getattr(defaults.inference, name) == getattr(published.inference, name)


@pytest.mark.parametrize("command", [finetune, probe])
def test_the_defaults_are_the_published_ones_but_for_the_batch(command):
    name = {finetune: "finetune_base_100ep", probe: "probe_base_90ep"}[command]
    defaults = auto_parser(command, as_positional=False).parse_args(["--data", "photos", "--weights", "run"])
    options = auto_parser(command, as_positional=False).parse_args(
        ["--config", str(recipes()[name]), "--data", "photos", "--weights", "run"]
    )
    for free in ("config", "batch_size", "image_size", "form", "optimizer.warmup_epochs"):
        for settings in (defaults, options):
            settings.pop(free, None)
    assert defaults == options
