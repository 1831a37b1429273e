"""Pretraining as a run's job: crops of any moment, the same whoever decodes them, pictures of what is made of them."""

import pytest
import torch
from PIL import Image
from torch import nn

import convmae
from convmae import UserError
from convmae.data.images import RandomCrop
from convmae.data.loading import Loading
from convmae.data.sources import open_images
from convmae.tasks import pretraining
from convmae.tasks.pretraining import ObjectiveTraining, PretrainingJob
from convmae.training.engine import DeviceOptions, start_engine


@pytest.fixture
def objective(autoencoder_file):
    return convmae.load(autoencoder_file)


@pytest.fixture
def job_of(photographs, tmp_path):
    """job_of(objective, data=photographs, **options), of two crops a batch."""

    def make(objective, data=photographs, **options):
        return PretrainingJob(
            start_engine(DeviceOptions("cpu", "float32")),
            objective,
            open_images(str(data)),
            RandomCrop((32, 32), 3, (0.2, 1.0)),
            Loading(batch_size=2, skip_damaged=True),
            origin="it",
            folder=tmp_path,
            seed=0,
            **options,
        )

    return make


def test_an_epoch_s_crops_are_the_same_from_any_of_them_on(job_of, objective):
    job = job_of(objective)
    assert job.passes == 5
    straight = list(job.batches(1, 0))
    assert [(crops.dtype, crops.shape) for crops in straight] == [(torch.uint8, (2, 3, 32, 32))] * 5
    for one, other in zip(straight[3:], job.batches(1, 3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(straight[0], next(iter(job.batches(2, 0))))


def test_its_module_has_the_objective_s_loss(job_of, objective):
    job = job_of(objective)
    assert isinstance(job.module, ObjectiveTraining)
    images = next(iter(job.batches(0, 0)))
    losses = []
    for loss_of in (job.module, objective):
        torch.manual_seed(0)  # masks are drawn
        losses.append(loss_of(images).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("aug_repeats", [1, 2])
def test_a_device_that_decodes_sees_the_same_crops(job_of, objective, photographs, tmp_path, monkeypatch, aug_repeats):
    """The CPU stands for the device: they differ by the rounding of resized pixels only."""
    for path in photographs.rglob("*.png"):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.open(path).save(tmp_path / "data" / f"{path.stem}.jpg", quality=95)
    here = list(job_of(objective, tmp_path / "data", aug_repeats=aug_repeats).batches(0, 0))
    monkeypatch.setattr(pretraining, "_decodes_on_device", lambda *given: True)
    there = list(job_of(objective, tmp_path / "data", aug_repeats=aug_repeats, decode="gpu").batches(0, 0))
    assert len(here) == len(there) == 5
    for one, other in zip(here, there, strict=True):
        assert (one.float() - other.float()).abs().mean() < 2


def test_an_objective_is_told_of_each_step(job_of):
    class Counting(nn.Module):
        steps = ()

        def after_step(self, step):
            self.steps += (step,)

    objective = Counting()
    job = job_of(objective)
    job.after_step(1)
    job.after_step(2)
    assert objective.steps == (1, 2)


@pytest.mark.parametrize(("every", "names"), [(0, {"latest.png"}), (2, {"epoch-0002.png", "latest.png"})])
def test_pictures_are_drawn_when_it_is_time_to(job_of, objective, tmp_path, every, names):
    job = job_of(objective, pictures_every_epochs=every)
    for epoch in range(4):
        job.after_epoch(epoch, last=epoch == 3)
    assert {path.name for path in (tmp_path / "reconstructions").iterdir()} == names
    assert job.picture == tmp_path / "reconstructions" / "latest.png"


def test_an_objective_without_pictures_has_none(job_of, tmp_path):
    class Blind(nn.Module):
        def examples(self, images):
            return None

    job_of(Blind()).after_epoch(0, last=True)
    assert not (tmp_path / "reconstructions").exists()
    with pytest.raises(UserError, match="pictures_every_epochs must be at least 0"):
        job_of(Blind(), pictures_every_epochs=-1)
