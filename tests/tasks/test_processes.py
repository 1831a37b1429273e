"""What the processes of a run share, as far as one process shows it; two of them train in tests of the commands."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from convmae.data.scenes import write_scenes
from convmae.errors import UserError
from convmae.tasks import processes
from convmae.training.engine import DeviceOptions, start_engine


def one_of(count, rank=0, device="cpu"):
    """As much of a Fabric as these functions ask for."""
    return SimpleNamespace(
        world_size=count,
        global_rank=rank,
        is_global_zero=rank == 0,
        device=torch.device(device),
        barrier=lambda: None,
    )


def test_each_process_loads_its_share():
    found = processes.process_loading(one_of(4, rank=3), DeviceOptions("cpu", workers=2), 16, skip_damaged=True)
    assert (found.batch_size, found.skip_damaged, found.num_workers) == (16, True, 2)
    assert (found.num_replicas, found.rank, found.pin_memory) == (4, 3, False)
    assert processes.process_loading(one_of(1, device="cuda"), DeviceOptions(workers=0), 1, False).pin_memory


def test_scenes_of_the_demo_are_written_by_one_process(tmp_path, monkeypatch):
    written = []

    def few(folder, layout, image_size):
        written.append((folder, layout, image_size))
        return write_scenes(folder, layout, 2, 1, image_size)

    monkeypatch.setattr(processes, "write_scenes", few)
    assert processes.demo_scenes(one_of(2, rank=1), tmp_path, "coco") == tmp_path / "scenes"
    assert written == []
    assert processes.demo_scenes(one_of(2), tmp_path, "coco", (64, 96)) == tmp_path / "scenes"
    assert written == [(tmp_path / "scenes", "coco", (64, 96))]
    assert len(list((tmp_path / "scenes" / "train2017").iterdir())) == 2


@pytest.mark.parametrize(
    ("count", "device", "shared"), [(1, "cpu", False), (2, "cpu", False), (1, "cuda", False), (2, "cuda", True)]
)
def test_batch_statistics_are_shared_where_torch_can(count, device, shared):
    network = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.ReLU())
    fabric = one_of(count, device=device)
    assert processes.shares_batch_statistics(fabric) is shared
    processes.share_batch_statistics(fabric, network)
    assert isinstance(network[0][0], nn.SyncBatchNorm) is shared
    assert network[0][0].num_features == 3


def test_every_buffer_is_that_of_the_first_process(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, src: sent.append((buffer, src)))
    network = nn.BatchNorm2d(3)
    processes.share_buffers(one_of(1), network)
    assert sent == []
    processes.share_buffers(one_of(2), network)
    assert [source for _, source in sent] == [0, 0, 0]
    assert all(one is other for (one, _), other in zip(sent, network.buffers(), strict=True))


def test_what_others_found_comes_in_their_order(monkeypatch):
    assert processes.gathered(one_of(1), ("a", "b")) == ["a", "b"]

    def from_two(parts, mine):
        parts[:] = [mine, ["c"]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", from_two)
    assert processes.gathered(one_of(2), ["a", "b"]) == ["a", "b", "c"]


def test_the_first_process_finds_and_all_know_or_stop():
    """Broadcasting is between processes; here a list stands for it."""
    wire = []

    def process(rank):
        return SimpleNamespace(
            is_global_zero=rank == 0, broadcast=lambda found: wire.append(found) or found if rank == 0 else wire[-1]
        )

    def refuse():
        raise UserError("check the data")

    assert [processes.from_first(process(rank), lambda: rank) for rank in (0, 1)] == [0, 0]  # noqa: B023
    for rank, find in ((0, refuse), (1, None)):
        with pytest.raises(UserError, match="check the data"):
            processes.from_first(process(rank), find)


def test_progress_leaves_the_results_as_they_are(capsys):
    fabric = start_engine(DeviceOptions("cpu", "float32"))
    assert list(processes.tracked(fabric, iter("abc"), 3, "judging")) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert (out, err.strip()) == (
        "",
        "",
    )  # no bar; older rich ends with an empty line
