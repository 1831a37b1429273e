import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import convmae
from convmae import UserError
from convmae.commands.info import info


@pytest.fixture(scope="module")
def base():
    return info("base")


def test_base_reproduces_the_published_arithmetic(base):
    """GMAC at 224x224, one image forward: of the published formulation, and of visible positions only."""
    parts = ("stage 1", "stage 2", "stage 3", "multi-scale projections", "decoder")
    dense = dict(zip(parts, (4.19, 2.64, 4.20, 0.85, 5.34), strict=True)) | {"total": 17.2}
    visible = dict(zip(parts, (1.05, 0.66, 3.94, 0.21, 5.34), strict=True)) | {"total": 11.2}
    assert base.gmac_dense == {
        name: pytest.approx(value, abs=0.03 if name == "total" else 0.006) for name, value in dense.items()
    }
    assert base.gmac_visible == {
        name: pytest.approx(value, abs=0.03 if name == "total" else 0.006) for name, value in visible.items()
    }


def test_base_reproduces_the_ablation_s_ratios(base):
    """The paper's FLOPs ablation: 1.7x for random masks at stage 1; 0.997x, 1.003x, 1.007x for kernels 3, 7, 9."""
    assert base.ratios["random masks at stage 1"] == pytest.approx(1.7, abs=0.05)
    for size, ratio in ((3, 0.997), (7, 1.003), (9, 1.007)):
        assert base.ratios[f"depthwise kernel {size}x{size}"] == pytest.approx(ratio, abs=0.001)


def test_base_has_the_published_parameters(base):
    assert round(base.parameters["encoder"] / 1e6, 1) == 84.6
    assert round(base.parameters["autoencoder"] / 1e6, 1) == 115.0
    assert round(base.parameters["classifier, 1000 classes"] / 1e6, 1) == 85.4


def test_parts_add_up_and_memory_grows_with_the_image():
    small, large = info("tiny", image_size=64), info("tiny", image_size=(64, 128))
    for figures in (small.gmac_dense, small.gmac_visible):
        assert sum(value for part, value in figures.items() if part != "total") == pytest.approx(figures["total"])
    assert 1.9 < large.activation_bytes / small.activation_bytes < 2.6  # twice the tokens; attention grows faster


def test_activation_bytes_are_what_autograd_keeps():
    """Against real tensors of a real model on the CPU."""
    model = convmae.create_autoencoder("tiny", image_size=96)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.backends.mkldnn.flags(enabled=False):  # torch's own layers, as on a GPU
        output = model(torch.randn(1, 3, 96, 96), masked_only=True)  # as training does
    real = sum(storage.nbytes() for storage in kept.values())
    assert info("tiny", image_size=96).activation_bytes == pytest.approx(real, rel=0.01)
    assert output.loss.isfinite()


def test_the_table_is_printed(capsys):
    info("tiny", image_size=64)
    printed = capsys.readouterr().out
    for words in ("stage 1", "GMAC visible only", "random masks at stage 1", "memory of a training step"):
        assert words in printed


def test_mistakes_are_refused():
    with pytest.raises(UserError, match="not divisible by 16"):
        info("tiny", image_size=(64, 70))
    with pytest.raises(UserError, match="task cannot be 'video': choose one of pretraining, detection, segmentation"):
        info("tiny", "video")
    with pytest.raises(UserError, match="image size 40x40 does not suit a segmenter"):
        info("tiny", "segmentation", 40)


# By the published configuration, in millions, the position embedding kept at 14 x 14.
DETECTOR = {"encoder": 84.6, "relative positions": 0.2, "pyramid": 2.9, "proposals": 1.2, "boxes": 15.6, "masks": 2.6}


def test_the_detector_has_the_published_numbers(capsys):
    result = info(task="detection")
    assert {part: round(result.parameters[part] / 1e6, 1) for part in DETECTOR} == DETECTOR
    assert round(result.parameters["total"] / 1e6, 1) == 107.2
    assert result.parameters["total"] == sum(result.parameters[part] for part in DETECTOR)
    assert round(result.gmac["total"] / 1e3, 1) == 0.9  # the paper's "0.9T" at 1024 x 1024
    printed = capsys.readouterr().out
    assert "107.18" in printed
    assert all(part in printed for part in DETECTOR)


def test_a_detector_s_arithmetic_grows_with_its_images():
    """Heads see as many regions whatever the image; what convolves over the image grows with its area."""
    small, large = (info("tiny", "detection", side, form="vitdet", num_classes=5) for side in (128, 256))
    assert large.gmac["boxes"] == small.gmac["boxes"]
    assert large.gmac["pyramid"] / small.gmac["pyramid"] == pytest.approx(4)
    assert large.gmac["encoder"] / small.gmac["encoder"] > 4  # of attention to everything
    assert small.parameters["encoder"] == large.parameters["encoder"]


SEGMENTER = {
    "encoder": "encoder",
    "relative positions": "encoder",
    "stride 32": "downsample4",
    "pyramid pooling": "decode_head",
    "feature pyramid": "decode_head",
    "fusion and classes": "decode_head",
    "auxiliary head": "auxiliary_head",
}
"""Its parts and in which of its modules each is."""


def test_the_segmenter_has_the_published_numbers(capsys):
    """153 million parameters and 0.6 T, as the paper counts: without the auxiliary head and what makes stride 32."""
    result = info(task="segmentation")
    parameters, gmac = result.parameters, result.gmac
    assert round(parameters["total"] / 1e6, 1) == 160.2
    unpublished = parameters["auxiliary head"] + parameters["stride 32"]
    assert round((parameters["total"] - unpublished) / 1e6, 1) == 153.1
    assert gmac["total"] - gmac["auxiliary head"] == pytest.approx(611, abs=2)
    assert gmac["total"] == pytest.approx(sum(gmac[part] for part in SEGMENTER if part != "relative positions"))
    printed = capsys.readouterr().out
    assert "160.18" in printed
    assert all(part in printed for part in SEGMENTER)


def test_the_segmenter_s_parts_are_those_of_a_built_one():
    result = info("tiny", "segmentation", (64, 96), num_classes=5)
    segmenter = convmae.create_segmenter("tiny", image_size=(64, 96), num_classes=5)
    sizes = {name: parameter.numel() for name, parameter in segmenter.named_parameters()}
    found = dict.fromkeys(SEGMENTER.values(), 0)
    for part, module in SEGMENTER.items():
        found[module] += result.parameters[part]
    assert found == {
        module: sum(size for name, size in sizes.items() if name.startswith(f"{module}.")) for module in found
    }
    tables = [size for name, size in sizes.items() if "rel" in name or "positions" in name]
    assert result.parameters["relative positions"] == sum(tables) > 0
    assert result.parameters["total"] == sum(sizes.values())


def test_a_segmenter_s_arithmetic_is_that_of_one_image():
    """Of a real forward pass; the auxiliary head, which counts in training only, besides.

    Attention is two matrix products there: torch's counter does not know each fused kernel in each version.
    """
    segmenter = convmae.create_segmenter("tiny", image_size=(64, 96), num_classes=5).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        segmenter(torch.zeros(1, 3, 64, 96))
    gmac = info("tiny", "segmentation", (64, 96), num_classes=5).gmac
    assert gmac["total"] - gmac["auxiliary head"] == pytest.approx(counter.get_total_flops() / 2e9)
