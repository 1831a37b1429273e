"""Images with label maps as a run's job: the batches of any moment, whose weights it goes on with."""

import shutil

import pytest
import torch

import convmae
from convmae import UserError
from convmae.data.loading import Loading
from convmae.data.segmentation import RandomScaleCrop
from convmae.tasks.segmentation.job import SegmentationJob, SegmenterTraining
from convmae.tasks.segmentation.views import Inference, InferenceOptions


@pytest.fixture
def job_of(fabric, source_of, tmp_path):
    """job_of(network, training=None, loading=None)."""

    def make(network, training=None, loading=None):
        infer = Inference(InferenceOptions(), network, 2)
        crop = RandomScaleCrop((64, 64), (0.8, 1.5), 0.75, 0.5, 0.5, 3)
        sources = (training or source_of("train"), source_of("val"))
        loading = loading or Loading(batch_size=4, skip_damaged=True)
        return SegmentationJob(fabric, network, *sources, crop, infer, loading, origin="it", folder=tmp_path, seed=0)

    return make


def test_an_epoch_s_batches_are_the_same_from_any_of_them_on(job_of, network):
    job = job_of(network)
    assert job.passes == 3
    straight = list(job.batches(1, 0))
    assert len(straight) == 3
    for images, labels in straight:
        assert (images.dtype, images.shape) == (torch.uint8, (4, 3, 64, 64))
        assert (labels.dtype, labels.shape) == (torch.uint8, (4, 64, 64))
    for (images, labels), (again, labelled_again) in zip(straight[2:], job.batches(1, 2), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, labelled_again)
    assert not torch.equal(straight[0][0], next(iter(job.batches(2, 0)))[0])


def test_its_module_has_the_losses_of_the_network(job_of, network):
    job = job_of(network)
    assert isinstance(job.module, SegmenterTraining)
    batch = next(iter(job.batches(0, 0)))
    network.train()
    losses = []
    for loss_of in (job.module, lambda batch: network(*batch)):
        torch.manual_seed(0)  # features are dropped at random
        losses.append(loss_of(batch).loss)
    assert torch.equal(*losses)


def test_it_goes_on_with_weights_of_its_own_classes_only(job_of, network, segmenter_file, reduced_file, same):
    job = job_of(network)
    other = convmae.load(segmenter_file)
    torch.nn.init.zeros_(other.decode_head.conv_seg.weight)
    job.load(segmenter_file, other)
    assert same(other.state_dict(), network.state_dict())
    with pytest.raises(UserError, match=r"holds a run with other classes than .*: choose another --output"):
        job.load(reduced_file, network)


def test_one_image_a_pass_has_no_statistics(job_of, network):
    with pytest.raises(UserError, match="batch normalisation needs two images or more in each pass"):
        job_of(network, loading=Loading(batch_size=1))


def test_what_has_no_partner_is_found(job_of, network, source_of, ade20k_scenes, tmp_path):
    data = shutil.copytree(ade20k_scenes, tmp_path / "scenes")
    sorted((data / "annotations" / "training").iterdir())[0].unlink()
    job = job_of(network, source_of("train", data))
    training, validation = job.findings.values()
    (finding,) = training
    assert finding.summary == "left out 1 images without a label map"
    assert finding.items[0].endswith(": has no label map")
    assert not validation
