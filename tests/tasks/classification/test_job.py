"""Labelled images as a run's job: the batches of any moment, accuracy by hand, whose weights it goes on with."""

import shutil

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torchvision.transforms import CenterCrop, InterpolationMode, PILToTensor, Resize

import convmae
from convmae import UserError
from convmae.data.augmentation import NO_AUGMENTATION, AugmentationOptions
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import Loading
from convmae.tasks.classification.job import ClassifierTraining, FinetuningJob
from convmae.training.engine import DeviceOptions, start_engine


@pytest.fixture
def network(labelled):
    """A classifier of the six colours."""
    classes = open_labelled_images(labelled, "train").classes
    settings = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 4, "image_size": 32}
    return convmae.create_classifier("tiny", **settings, num_classes=6, classes=list(classes))


@pytest.fixture
def job_of(labelled, tmp_path):
    """job_of(network, data=labelled, augmentation=NO_AUGMENTATION, batch_size=8)."""

    def make(network, data=labelled, augmentation=NO_AUGMENTATION, batch_size=8):
        training = open_labelled_images(data, "train", shuffled=True)
        return FinetuningJob(
            start_engine(DeviceOptions("cpu", "float32")),
            network,
            network,
            training,
            open_labelled_images(data, "val", training.classes),
            Loading(batch_size, skip_damaged=True),
            origin="it",
            data=str(data),
            folder=tmp_path,
            augmentation=augmentation,
            seed=0,
        )

    return make


@pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, AugmentationOptions()])
def test_an_epoch_s_batches_are_the_same_from_any_of_them_on(job_of, network, augmentation):
    job = job_of(network, augmentation=augmentation)
    assert job.passes == 6
    straight = list(job.batches(1, 0))
    assert len(straight) == 6
    for images, targets in straight:
        assert (images.dtype, images.shape, targets.shape) == (torch.float32, (8, 3, 32, 32), (8, 6))
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    for (images, targets), (again, targets_again) in zip(straight[4:], job.batches(1, 4), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(targets, targets_again)
    assert not torch.equal(straight[0][0], next(iter(job.batches(2, 0)))[0])
    certain = all((targets.max(dim=1).values == 1).all() for _, targets in straight)
    assert certain == (augmentation == NO_AUGMENTATION)


def test_its_module_has_the_cross_entropy_of_soft_targets(job_of, network):
    job = job_of(network, augmentation=AugmentationOptions())
    assert isinstance(job.module, ClassifierTraining)
    images, targets = next(iter(job.batches(0, 0)))
    network.eval()
    torch.testing.assert_close(job.module((images, targets)).loss, cross_entropy(network(images), targets))


def test_it_is_judged_by_the_accuracy_on_the_other_images(job_of, network, labelled):
    """Read and cropped one by one."""
    accuracy = job_of(network).judge(network)
    network.eval()
    logits, truth = [], []
    for number, name in enumerate(network.classes):
        for path in sorted((labelled / "val" / name).iterdir()):
            image = CenterCrop(32)(Resize(int(32 / 0.875), InterpolationMode.BICUBIC)(Image.open(path)))
            with torch.no_grad():
                logits.append(network(PILToTensor()(image)[None])[0])
            truth.append(number)
    logits, truth = torch.stack(logits), torch.tensor(truth)
    assert accuracy.confusion.sum() == len(truth) == 18
    assert accuracy.top1 == pytest.approx((logits.argmax(dim=1) == truth).float().mean().item())
    assert accuracy.loss == pytest.approx(cross_entropy(logits, truth).item(), rel=1e-3)


def test_without_one_image_nothing_is_judged(job_of, network, labelled, tmp_path):
    data = shutil.copytree(labelled, tmp_path / "data")
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no validation image can be decoded"):
        job_of(network, data).judge(network)


def test_it_goes_on_with_weights_of_its_own_classes_only(job_of, network, tmp_path):
    job = job_of(network)
    job.save(tmp_path / "own.safetensors", network)
    before = network.head.weight.clone()
    torch.nn.init.zeros_(network.head.weight)
    job.load(tmp_path / "own.safetensors", network)
    assert torch.equal(network.head.weight, before)
    network.classes = ["zinc", *network.classes[1:]]
    job.save(tmp_path / "other.safetensors", network)
    with pytest.raises(UserError, match=r"holds a run with other classes than .*: choose another --output"):
        job.load(tmp_path / "other.safetensors", network)


def test_mixup_needs_pairs(job_of, network):
    with pytest.raises(UserError, match="mixup and cutmix need pairs, a pass has 3 images"):
        job_of(network, augmentation=AugmentationOptions(), batch_size=3)
    assert job_of(network, batch_size=3).passes == 16
