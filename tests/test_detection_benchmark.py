"""The script that measures the detector: its figures, and what it refuses."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from torchvision.ops import masks_to_boxes

from convmae import UserError
from convmae.benchmarks.turns import Spread, Turns

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "detection.py"


@pytest.fixture(scope="module")
def script():
    """What the script defines."""
    return runpy.run_path(str(SCRIPT))


def test_both_ways_of_each_form_are_measured(script, tmp_path, capsys):
    output = tmp_path / "new" / "detection.json"
    script["main"](model="tiny", image_size=64, rounds=1, precision="float32", device="cpu", output=output)
    printed = capsys.readouterr().out
    saved = json.loads(output.read_text())
    assert "tiny, 64x64, batch 1, 1 rounds" in saved["title"]
    assert [(x["form"], x["precision"]) for x in saved["comparisons"]] == [("paper", "float32"), ("vitdet", "float32")]
    for comparison in saved["comparisons"]:
        assert f"{comparison['form']}, float32" in printed
        for work in ("training", "inference"):
            unfused, ours = comparison[work]
            assert [unfused["name"], ours["name"]] == ["unfused", "ours"]
            assert unfused["ratio"] == {"median": 1, "low": 1, "high": 1}
            assert ours["ratio"]["median"] == pytest.approx(unfused["milliseconds"] / ours["milliseconds"])
            assert ours["outcome"] == pytest.approx(unfused["outcome"], rel=1e-4 if work == "training" else 0.05)
            for way in (unfused, ours):
                speed = way["images_per_second"]
                assert speed["low"] == speed["median"] == speed["high"] == pytest.approx(1e3 / way["milliseconds"])
                assert 0 < way["peak_gib"] < 2
        assert 20 < comparison["inference"][1]["outcome"] <= 100  # so that there are masks to paste


def test_figures_are_those_of_the_batch_and_of_all_that_is_held(script):
    """Four images in 2, 4 and 8 s against 1, 4 and 2 s; a hundred weights of 4 bytes, half of them trained."""
    model = torch.nn.ParameterList([torch.zeros(50), torch.nn.Parameter(torch.zeros(50), requires_grad=False)])
    turns = Turns({"unfused": [2.0, 4.0, 8.0], "ours": [1.0, 4.0, 2.0]}, {"unfused": 600.0, "ours": 400.0})
    detectors, outcomes = {"unfused": model, "ours": model}, {"unfused": 5.0, "ours": 6.0}
    for moments, held in ((2, 100 * 4 + 50 * 8), (0, 100 * 4)):
        unfused, ours = script["_figures"](detectors, turns, outcomes, 4, moments)
        assert (unfused.images_per_second, unfused.ratio) == (Spread(1, 0.5, 2), Spread(1, 1, 1))
        assert (ours.images_per_second, ours.ratio) == (Spread(2, 1, 4), Spread(2, 1, 4))
        assert (ours.milliseconds, ours.outcome) == (2000, 6)
        assert unfused.peak_gib * 2**30 == pytest.approx(600 + held)
        assert ours.peak_gib * 2**30 == pytest.approx(400 + held)


def test_checkpointing_is_that_of_both_ways(script):
    for checkpointing in (False, True):
        detectors = script["make_detectors"]("paper", "tiny", 64, checkpointing)
        assert [x.encoder.grad_checkpointing for x in detectors.values()] == [checkpointing] * 2


def test_targets_are_rectangles_with_their_masks(script):
    targets = script["random_targets"](96, 3, 5, torch.device("cpu"))
    assert len(targets) == 3
    for target in targets:
        assert target["labels"].shape == (7,)
        assert 1 <= target["labels"].min() <= target["labels"].max() <= 5
        assert torch.equal(masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1]), target["boxes"])
        left, top, right, bottom = target["boxes"].unbind(1)
        assert torch.equal(target["masks"].sum((1, 2)), ((right - left) * (bottom - top)).long())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"model": "colossal"}, "unknown model 'colossal'"),
        ({"image_size": 80}, "multiples of 32"),
    ],
)
def test_mistakes_are_refused(script, settings, message):
    with pytest.raises(UserError, match=message):
        script["main"](**{"model": "tiny", **settings})


def test_a_mistake_is_one_line_on_the_terminal(monkeypatch):
    monkeypatch.setattr("sys.argv", ["detection.py", "--model", "tiny", "--image_size", "80"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    message = ended.value.code  # which Python prints
    assert isinstance(message, str)
    assert "multiples of 32" in message
    assert "\n" not in message
