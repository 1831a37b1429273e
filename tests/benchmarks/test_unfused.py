import pytest
import torch

from convmae.benchmarks.unfused import with_unfused_attention
from convmae.kinds import create_detector


@pytest.fixture(params=["paper", "vitdet"])
def detectors(request):
    """Ours and the unfused copy, with relative positions that matter."""
    torch.manual_seed(0)
    ours = create_detector("tiny", image_size=(96, 128), form=request.param, num_classes=3)
    for name, parameter in ours.named_parameters():
        if "positions." in name:
            torch.nn.init.normal_(parameter)
    return ours, with_unfused_attention(ours)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_maps_and_gradients_are_those_of_the_fused_encoder(detectors, checkpointing):
    images, weights = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8), torch.randn(2, 6, 8, 192)
    expected, found = {}, {}
    for detector, values in zip(detectors, (expected, found), strict=True):
        detector.set_grad_checkpointing(checkpointing)
        values["map"] = detector.encoder(images)
        (values["map"] * weights).sum().backward()
        values |= {name: parameter.grad for name, parameter in detector.encoder.named_parameters()}
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5 * scale, msg=name)
        assert scale > 1e-3, name


def test_losses_and_gradients_are_those_of_the_fused_detector(detectors):
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[:, 20:70, 10:90] = 1
    boxes = torch.tensor([[10.0, 20.0, 90.0, 70.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([label]), "masks": masks} for label in (1, 3)]
    losses, gradients = [], []
    for detector in detectors:
        torch.manual_seed(1)  # of the samples of boxes
        found = detector.train()(images, targets)
        found.loss.backward()
        losses.append(torch.stack(found))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in detector.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    # A ReLU of the heads may end on the other side of zero.
    assert (gradients[1] - gradients[0]).norm() < 5e-3 * gradients[0].norm()


def test_the_copy_shares_nothing_and_has_the_same_weights(detectors):
    ours, unfused = detectors
    state = unfused.state_dict()
    assert state.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(state[name], value)
        assert state[name].data_ptr() != value.data_ptr()


def test_all_scores_are_in_memory(detectors):
    """torch's fused attention is not in the unfused copy."""
    images = torch.zeros(1, 3, 96, 128, dtype=torch.uint8)
    operations = []
    for detector in detectors:
        with torch.profiler.profile() as profiled, torch.no_grad():
            detector.encoder(images)
        operations.append({event.name for event in profiled.events()})
    fused, unfused = operations
    assert "aten::scaled_dot_product_attention" in fused - unfused
    assert "aten::softmax" in unfused - fused
