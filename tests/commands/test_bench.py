import json

import pytest
import torch

from convmae import UserError
from convmae.benchmarks.contenders import make_contenders
from convmae.commands.bench import bench, search_largest_batch


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
