import pytest
import torch

from convmae import UserError
from convmae.training.checkpoint import STATE_FILE, CheckpointFolder, read_state, replace_file


def write_model(folder):
    (folder / "model.bin").write_bytes(b"model")


def test_what_is_saved_comes_back(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    state = {
        "step": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}, "groups": [{"betas": (0.9, 0.95)}]},
    }
    path = checkpoints.save(3, state, write_model)
    assert path.name == "step-00000003"
    assert (path / "model.bin").read_bytes() == b"model"
    back = read_state(path)
    assert back["step"] == 3
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])


def test_the_newest_few_are_kept(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    for step in (9, 10, 100):
        checkpoints.save(step, {"step": step}, write_model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoints.newest() == tmp_path / "step-00000100"


def test_a_write_that_dies_leaves_the_last_good_checkpoint(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    good = checkpoints.save(1, {"step": 1}, write_model)

    def die(folder):
        (folder / "half").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(2, {"step": 2}, die)
    assert checkpoints.newest() == good
    assert read_state(checkpoints.save(3, {"step": 3}, write_model)) == {"step": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_the_same_step_can_be_written_again(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(1, {"value": 1}, write_model)
    assert read_state(checkpoints.save(1, {"value": 2}, write_model)) == {"value": 2}


def test_damaged_states_and_code_are_refused(tmp_path):
    path = CheckpointFolder(tmp_path).save(1, {"step": 1}, write_model)
    (path / STATE_FILE).write_bytes(b"no state")
    with pytest.raises(UserError, match="damaged: delete that folder"):
        read_state(path)
    torch.save({"code": print}, path / STATE_FILE)
    with pytest.raises(UserError, match="damaged"):
        read_state(path)


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be at least 1"):
        CheckpointFolder(tmp_path, keep=0)


def test_a_replaced_file_is_whole_and_alone(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    for text in ("first", "second, longer"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_a_writer_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def die(temporary):
        temporary.write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, die)
    assert path.read_text() == "old"
    replace_file(path, lambda temporary: temporary.write_text("new"))  # the half-written one is no obstacle
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]
