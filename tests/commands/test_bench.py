import json

import pytest
import torch

from convmae import UserError
from convmae.commands.bench import bench, count_steps, make_contenders, search_largest_batch


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_both_formulations_compute_the_same_loss(task, tmp_path, capsys):
    output = tmp_path / "new" / "bench.json"
    results = bench("tiny", task, image_size=64, batch_size=2, rounds=3, output=output, device="cpu")
    assert [result.precision for result in results] == ["float32", "bf16"]
    for result, tolerance in zip(results, (1e-5, 1e-2), strict=True):
        steps = {step.name: step for step in result.steps}
        assert list(steps) == ["published", *(["MAE, plain ViT"] if task == "pretrain" else []), "ours"]
        assert steps["ours"].loss == pytest.approx(steps["published"].loss, rel=tolerance)
        assert (result.time_over_vit is not None) == (task == "pretrain")
        for step in result.steps:
            speed = step.images_per_second
            assert 0 < speed.low <= speed.median <= speed.high
            assert step.milliseconds == pytest.approx(2e3 / speed.median)
            # Forward and backward are three times the forward.
            rate = 3 * step.gmac * speed.median
            assert step.share_of_peak == pytest.approx(rate / result.peak_gmacs, rel=1e-6)
            assert step.peak_gib > 0
        assert steps["published"].ratio.low == steps["published"].ratio.high == 1
    saved = json.loads(output.read_text())
    assert [step["name"] for step in saved["results"][0]["steps"]] == list(steps)
    assert saved["results"][0]["steps"][0]["images_per_second"]["low"] > 0
    assert task in saved["title"]
    assert "published" in capsys.readouterr().out


def test_the_arithmetic_of_base_is_the_known_one():
    """GMAC at 224x224, forward: published 17.2, visible positions only 11.2, MAE with ViT-B 9.8."""
    counted = {name: macs / 1e9 for name, macs in count_steps("pretrain", "base", 224).items()}
    # Visible tokens are not predicted: 49 tokens' part in the last block's attention, 2 x 196 x 512, output and MLP,
    # 9 x 512 x 512, and in the prediction, 512 x 768.
    spared = 49 * (2 * 196 * 512 + 9 * 512**2 + 512 * 768) / 1e9
    # MAE without class token, 85 M weights in the encoder and 25 M in the decoder, embeds visible patches only.
    spared_by_mae = spared + (85 + 25) * 1e6 / 1e9 + 147 * 768**2 / 1e9
    expected = {"published": 17.2, "ours": 11.2 - spared, "MAE, plain ViT": 9.8 - spared_by_mae}
    assert counted == {name: pytest.approx(value, abs=0.04) for name, value in expected.items()}


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_a_contender_needs_nothing_but_its_own_model(task):
    """The search for the largest batch leaves the others on another device."""
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    for contender in make_contenders(task, "tiny", 64):
        contender.model.to("meta")
        assert contender.loss_of(images.to("meta"), None).shape == ()


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_the_largest_batch_is_the_last_before_memory_ends(error):
    contenders, tried = make_contenders("pretrain", "tiny", 32), []

    def loss_of(images, visible):
        tried.append(len(images))
        if len(images) > 7:
            raise error("CUDA out of memory")
        return contenders[-1].loss_of(images, visible)

    limited = contenders[-1]._replace(loss_of=loss_of)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert search_largest_batch(limited, contenders, images, "float32", compiled=False) == 7
    assert tried == [2, 4, 8, 6, 7]

    def broken(images, visible):
        raise RuntimeError("not that")

    with pytest.raises(RuntimeError, match="not that"):
        search_largest_batch(limited._replace(loss_of=broken), contenders, images, "float32", compiled=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"largest_batch": True, "device": "cpu"}, "GPU's memory"),
    ],
)
def test_mistakes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        bench("tiny", **settings)
