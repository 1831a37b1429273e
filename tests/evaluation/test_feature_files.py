from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file

import convmae
from convmae.evaluation import feature_files
from convmae.evaluation.feature_files import FeatureParts, read_features

FACTS = {"stage": "pooled", "weights": "w"}


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_any_parts_become_the_same_file(tmp_path, monkeypatch, suffix, shape):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(feature_files, "_PART_BYTES", 1)  # so each addition is a part, and each row a row group
    features, names = torch.randn(7, *shape), [f"ä {number}" for number in range(9)]
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 8])
    files = []
    for number, divisions in enumerate([(0, 7), (0, 2, 3, 7)]):
        parts = FeatureParts(tmp_path / "parts", {"run": 1})
        for first, last in pairwise(divisions):
            parts.add(features[first:last], kept[first:last], int(kept[last - 1]) + 1, [])
        files.append(tmp_path / f"{number}{suffix}")
        assert parts.join(files[-1], names, FACTS) == (7, *shape)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    read = read_features(files[0])
    assert torch.equal(read.features, features)
    assert read.paths == [names[index] for index in kept]
    assert read.facts == FACTS


def test_parts_are_found_again(tmp_path):
    parts = FeatureParts(tmp_path / "parts", {"run": 1})
    parts.add(torch.zeros(2, 3), torch.tensor([0, 2]), 3, ["b: broken"])
    assert FeatureParts(tmp_path / "parts", {"run": 1}).position == 0  # waiting, as ten seconds have not passed
    parts.flush()
    again = FeatureParts(tmp_path / "parts", {"run": 1})
    assert (again.position, again.damaged) == (3, ["b: broken"])
    with pytest.raises(convmae.UserError, match="other run"):
        FeatureParts(tmp_path / "parts", {"run": 2})


def test_a_folder_without_features_hinders_nobody(tmp_path):
    FeatureParts(tmp_path / "parts", {"run": 1})
    FeatureParts(tmp_path / "parts", {"run": 2})


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_foreign_files_are_refused(tmp_path, suffix):
    pytest.importorskip("pyarrow")
    (tmp_path / f"text{suffix}").write_text("text")
    save_file({"features": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in (f"text{suffix}", "other.safetensors"):
        with pytest.raises(convmae.UserError, match="holds no features: give a file that convmae embed wrote"):
            read_features(tmp_path / name)
