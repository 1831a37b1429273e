"""The published linear probe: a frozen encoder, statistics without weights, one layer; its own small file."""

import pytest
import torch
from safetensors.torch import load_file

from convmae import UserError
from convmae.data.augmentation import NO_AUGMENTATION
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import Loading
from convmae.kinds import load_classifier
from convmae.tasks.classification.probe import ProbedEncoder, ProbeJob
from convmae.training.engine import DeviceOptions, start_engine


@pytest.fixture
def probed(autoencoder_file):
    return ProbedEncoder(load_classifier(autoencoder_file, num_classes=0, global_pool="avg"), 6)


@pytest.fixture
def job_of(labelled, tmp_path):
    """job_of(probed)."""

    def make(probed):
        training = open_labelled_images(labelled, "train", shuffled=True)
        return ProbeJob(
            start_engine(DeviceOptions("cpu", "float32")),
            probed,
            probed.classifier,
            training,
            open_labelled_images(labelled, "val", training.classes),
            Loading(8),
            origin="it",
            data="colours",
            folder=tmp_path,
            augmentation=NO_AUGMENTATION,
            seed=0,
        )

    return make


def test_the_encoder_is_frozen_and_stays_as_it_is_used(probed):
    probed.train()
    assert probed.norm.training
    assert not any(module.training for module in probed.classifier.modules())
    assert {name for name, value in probed.named_parameters() if value.requires_grad} == {"layer.weight", "layer.bias"}
    probed(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(value.grad is None for value in probed.classifier.parameters())


def test_it_is_one_linear_function_of_the_features(probed):
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    probed.train()(images)  # so that there are statistics
    probed.eval()
    fitted = probed.linear_probe()
    with torch.no_grad():
        features = probed.classifier.forward_head(probed.classifier.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features @ fitted.weight.T + fitted.bias, probed(images), rtol=1e-4, atol=1e-5)


def test_its_file_has_the_layer_alone_and_is_of_one_encoder(job_of, probed, tmp_path, same):
    job = job_of(probed)
    probed.norm.running_mean.normal_()
    job.save(tmp_path / job.model_file, probed)
    stored = load_file(tmp_path / "head.safetensors")
    assert {name.partition(".")[0] for name in stored} == {"norm", "layer"}
    before = {name: value.clone() for name, value in probed.state_dict().items()}
    torch.nn.init.zeros_(probed.layer.weight)
    probed.norm.reset_running_stats()
    job.load(tmp_path / "head.safetensors", probed)
    assert same(dict(probed.state_dict()), before)
    with torch.no_grad():
        probed.classifier.encoder.pos_embed.add_(1)
    with pytest.raises(UserError, match="holds a run of another encoder or with other classes: choose another"):
        job_of(probed).load(tmp_path / "head.safetensors", probed)


def test_no_best_one_is_kept(job_of, probed):
    assert job_of(probed).figure is None
