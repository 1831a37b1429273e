import json

import pytest

from convmae import UserError
from convmae.commands.bench import bench


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_both_formulations_compute_the_same_loss(task, tmp_path, capsys):
    output = tmp_path / "new" / "bench.json"
    results = bench("tiny", task, image_size=64, batch_size=2, rounds=2, output=output, device="cpu")
    assert [result.precision for result in results] == ["float32", "bf16"]
    for result, tolerance in zip(results, (1e-5, 1e-2), strict=True):
        assert result.loss == pytest.approx(result.published_loss, rel=tolerance)
        median, low, high = result.images_per_second
        assert 0 < low <= median <= high
        assert result.peak_gib > 0
    saved = json.loads(output.read_text())
    assert len(saved["results"]) == 2
    assert task in saved["title"]
    assert "published" in capsys.readouterr().out


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        bench("tiny", rounds=0)
