from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from convmae import UserError
from convmae.training.checkpoint import CheckpointFolder
from convmae.training.folder import checkpoint_to_resume, keep_config, plain_settings, read_config


@dataclass(frozen=True)
class Options:
    betas: tuple[float, float] = (0.9, 0.95)
    folder: Path | None = Path("a/b")


def test_a_run_goes_on_only_where_that_was_asked_for(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    for resume in (False, True):
        assert checkpoint_to_resume(tmp_path, checkpoints, resume) is None
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds a run without checkpoint: start it anew with --resume"):
        checkpoint_to_resume(tmp_path, checkpoints, resume=False)
    assert checkpoint_to_resume(tmp_path, checkpoints, resume=True) is None
    for step in (20, 100):
        checkpoints.save(step, {"step": step}, lambda folder: None)
    with pytest.raises(UserError, match="holds a run: continue it with --resume, or choose another --output"):
        checkpoint_to_resume(tmp_path, checkpoints, resume=False)
    assert checkpoint_to_resume(tmp_path, checkpoints, resume=True) == tmp_path / "checkpoints" / "step-00000100"


def test_the_model_of_another_command_is_not_mixed_with_a_run(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for resume in (False, True):
        with pytest.raises(UserError, match="holds another command's model: choose another --output"):
            checkpoint_to_resume(tmp_path, CheckpointFolder(tmp_path / "checkpoints"), resume=resume)


def test_plain_settings_are_what_yaml_gives_back():
    settings = {"options": Options(), "output": Path("runs/x"), "sizes": [(1, 2), None], "lr": 1e-4, "resume": False}
    plain = plain_settings(settings)
    assert plain == {
        "options": {"betas": [0.9, 0.95], "folder": "a/b"},
        "output": "runs/x",
        "sizes": [[1, 2], None],
        "lr": 1e-4,
        "resume": False,
    }
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


def test_the_configuration_is_kept_and_changes_go_beside_it(tmp_path):
    first, second = {"epochs": 1, "data": "photos"}, {"epochs": 2, "data": "photos"}
    keep_config(tmp_path, first, 0)
    keep_config(tmp_path, first, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    keep_config(tmp_path, second, 7)
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text()).items()) == list(first.items())  # in this order
    assert yaml.safe_load((tmp_path / "config-from-step-00000007.yaml").read_text()) == second


def test_the_last_part_s_configuration_is_what_a_run_goes_on_with(tmp_path):
    assert read_config(tmp_path) == {}
    for epochs, step in ((1, 0), (2, 7), (2, 9), (1, 12), (1, 12)):
        keep_config(tmp_path, {"epochs": epochs}, step)
        assert read_config(tmp_path) == {"epochs": epochs}
    assert len(list(tmp_path.iterdir())) == 3  # the first, those from 7 and from 12 on
    (tmp_path / "config-from-step-00000012.yaml").write_text("a: [")
    assert read_config(tmp_path) == {}
