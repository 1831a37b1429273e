"""Annotated images as a run's job: the batches of any moment, their precision, whose weights it goes on with."""

import json
import shutil

import pytest
import torch

import convmae
from convmae import UserError
from convmae.data.detection import LargeScaleJitter
from convmae.data.scenes import CATEGORY_IDS, SHAPES
from convmae.tasks.detection.job import AnnotatedBatch, DetectionJob, DetectorTraining
from convmae.training.engine import DeviceOptions, start_engine


@pytest.fixture
def job_of(fabric, source_of, fours, tmp_path):
    """job_of(network, training=None)."""

    def make(network, training=None):
        jitter = LargeScaleJitter((64, 64), (0.5, 1.5), 0.5, 3)
        sources = (training or source_of("train"), source_of("val"))
        return DetectionJob(fabric, network, *sources, jitter, fours, origin="it", folder=tmp_path, seed=0)

    return make


def test_an_epoch_s_batches_are_the_same_from_any_of_them_on(job_of, network, same):
    job = job_of(network)
    assert job.passes == 3
    straight = list(job.batches(1, 0))
    assert len(straight) == 3
    for batch in straight:
        assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 3, 64, 64))
        assert len(batch.targets) == 4
    (again,) = job.batches(1, 2)
    assert torch.equal(again.images, straight[2].images)
    assert same(again.targets, straight[2].targets)
    assert not torch.equal(straight[0].images, next(iter(job.batches(2, 0))).images)


def test_its_module_has_the_losses_of_the_network(job_of, network):
    job = job_of(network)
    assert isinstance(job.module, DetectorTraining)
    batch = next(iter(job.batches(0, 0)))
    network.train()
    losses = []
    for loss_of in (job.module, lambda batch: network(batch.images, batch.targets)):
        torch.manual_seed(0)  # proposals are drawn
        losses.append(loss_of(batch).loss)
    assert torch.equal(*losses)


def test_boxes_keep_their_pixels_in_bf16():
    """Fabric turns the floats of a batch into bf16, of which 1001.5 is not one."""
    fabric = start_engine(DeviceOptions("cpu", "bf16", 0))

    class Keeper(torch.nn.Module):
        def forward(self, batch):
            return batch.targets[0]["boxes"]

    boxes = torch.tensor([[1001.5, 3.0, 1003.5, 7.0]])
    batch = AnnotatedBatch(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [{"boxes": boxes}])
    assert torch.equal(fabric.setup_module(Keeper())(batch), boxes)


def test_it_goes_on_with_weights_of_its_own_classes_only(job_of, network, tmp_path):
    job = job_of(network)
    settings = {**network.settings, "classes": list(SHAPES), "category_ids": list(CATEGORY_IDS)}
    state = network.state_dict()
    convmae.weights.save(tmp_path / "own.safetensors", state, settings)
    job.load(tmp_path / "own.safetensors", network)
    for name, other in (("classes", ["plate", *SHAPES[1:]]), ("category_ids", [90, *CATEGORY_IDS[1:]])):
        convmae.weights.save(tmp_path / "other.safetensors", state, {**settings, name: other})
        with pytest.raises(UserError, match=r"holds a run with other classes than .*: choose another --output"):
            job.load(tmp_path / "other.safetensors", network)


def test_what_is_broken_is_found(job_of, network, source_of, coco_scenes, tmp_path):
    data = shutil.copytree(coco_scenes, tmp_path / "scenes")
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = -5
    file.write_text(json.dumps(content))
    job = job_of(network, source_of("train", data))
    training, validation = job.findings.values()
    (finding,) = training
    assert finding.summary == "left out 1 broken annotations"
    assert "negative width" in finding.items[0]
    assert not validation
