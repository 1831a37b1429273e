import pytest
import torch

import convmae
from convmae.evaluation.features import extract_features
from convmae.training.engine import DeviceOptions, start_engine


@pytest.fixture(scope="module")
def fabric():
    return start_engine(DeviceOptions(accelerator="cpu", precision="float32"))


@pytest.fixture
def model():
    """In training mode, where dropped paths would change the features."""
    small = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 4, "image_size": 32}
    return convmae.create_classifier("tiny", **small, num_classes=3, drop_rate=0.5, drop_path=0.5).train()


@pytest.fixture
def batches():
    """Three batches of uint8 images, an empty one before the last."""
    images = torch.randint(256, (7, 3, 32, 48), dtype=torch.uint8)
    return [{"images": images[:4], "number": 0}, {"images": torch.empty(0), "number": 1}, {"images": images[4:]}]


def by_hand(model, images):
    """Pooled features as the last layer receives them, and the three maps (B, C, H, W)."""
    received = []
    hook = model.head.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    model.eval()
    with torch.no_grad():
        model(images)
        maps = model.forward_intermediates(images, intermediates_only=True)
    hook.remove()
    return received[0], maps


def test_pooled_features_are_the_last_layers_input(fabric, model, batches):
    found = list(extract_features(fabric, model, batches))
    assert [batch is given for (_, batch), given in zip(found, (batches[0], batches[2]), strict=True)] == [True, True]
    assert not model.training
    for features, batch in found:
        expected, _ = by_hand(model, batch["images"])
        assert (features.shape, features.dtype) == ((len(batch["images"]), 32), torch.float32)
        torch.testing.assert_close(features, expected)
        with torch.no_grad():
            pooled = model.forward_head(model.forward_features(batch["images"]), pre_logits=True)
        assert torch.equal(features, pooled)
    assert found[0][0].std(dim=0).max() > 1e-3  # the images differ, and so do their features


@pytest.mark.parametrize(("stage", "shape"), [(1, (8, 12, 16)), (2, (4, 6, 24)), (3, (2, 3, 32))])
def test_stage_maps_are_the_intermediates(fabric, model, batches, stage, shape):
    found = list(extract_features(fabric, model, batches, stage))
    assert [features.shape for features, _ in found] == [(4, *shape), (3, *shape)]
    for features, batch in found:
        _, maps = by_hand(model, batch["images"])
        torch.testing.assert_close(features, maps[stage - 1].permute(0, 2, 3, 1))


def test_no_gradients_are_kept_and_the_caller_keeps_its_own(fabric, model, batches):
    for features, _ in extract_features(fabric, model, batches):
        assert not features.requires_grad
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_are_read_as_they_are_asked_for(fabric, model, batches):
    read = []
    features = extract_features(fabric, model, (read.append(1) or batch for batch in batches))
    assert read == []
    next(features)
    assert read == [1]


def test_nothing_but_empty_batches_gives_nothing(fabric, model):
    assert list(extract_features(fabric, model, [{"images": torch.empty(0)}] * 2)) == []
