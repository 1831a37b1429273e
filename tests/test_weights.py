import argparse
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import convmae
from convmae import weights

TINY = {"image_size": 64, "widths": (8, 12, 16), "depths": (2, 1, 3), "num_heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def published(golden, name="pretrain_tiny"):
    return {key.removeprefix("weights."): value for key, value in golden(name).items() if key.startswith("weights.")}


def test_there_and_back_is_the_identity(golden):
    for name in ("pretrain_tiny", "classifier_tiny"):
        state = published(golden, name)
        back = weights.to_published(weights.from_published(state))
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_strided_convolution_and_its_matrix_agree(golden):
    state = published(golden)
    image = torch.randn(2, 3, 32, 32)
    expected = torch.nn.functional.conv2d(image, state["patch_embed1.proj.weight"], stride=4)
    matrix = weights.from_published(state)["encoder.downsample1.proj.weight"]
    blocks = image.permute(0, 2, 3, 1).reshape(2, 8, 4, 8, 4, 3).transpose(2, 3).flatten(3)
    torch.testing.assert_close((blocks @ matrix.t()).permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["detection_backbone_tiny", "vitdet_backbone_tiny"])
def test_relative_positions_go_there_and_back(golden, name):
    state = published(golden, name)
    ours = weights.from_published(state)
    back = weights.to_published(ours)
    follows = {key for key in state if key.endswith("relative_position_index")}  # from the table's shape
    assert len(follows) == (2 if name == "detection_backbone_tiny" else 0)
    assert back.keys() == state.keys() - follows
    assert all(torch.equal(back[key], state[key]) for key in back)
    tables = {key for key in ours if "positions." in key}
    assert all(key.startswith("encoder.") for key in ours)
    assert len(tables) == (2 if name == "detection_backbone_tiny" else 22)


@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_s_other_parts_pass_through_published_names(form):
    state = convmae.create_detector("tiny", form=form, image_size=(64, 64), head_width=16, box_width=16).state_dict()
    there = weights.to_published(state)
    assert weights.is_published(there)
    back = weights.from_published(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_relative_positions_that_are_no_square_are_refused(golden):
    state = published(golden, "detection_backbone_tiny")
    name = "global_rel_pos_bias.relative_position_bias_table"
    with pytest.raises(convmae.UserError, match=f"the positions '{name}' are 960, no square"):
        weights.from_published({**state, name: state[name][:-1]})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {
            "model": {"state_dict": state},
            "epoch": 7,
            "args": argparse.Namespace(norm_pix_loss=False),
        },
    ],
    ids=["bare", "model", "state_dict", "module prefix", "nested, with a namespace"],
)
def test_any_wrapping_of_a_torch_file_loads(golden, tmp_path, wrap):
    state = published(golden)
    torch.save(wrap(state), tmp_path / "weights.pth")
    model = convmae.load(tmp_path / "weights.pth", num_heads=4, decoder_num_heads=4)
    ours = weights.from_published(state)
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    wrapped = wrap(state)
    assert model.norm_pix is not ("args" in wrapped)


def test_safetensors_and_state_dicts_load_too(golden, tmp_path):
    state = published(golden)
    save_file(state, tmp_path / "published.safetensors")
    from_file = convmae.load(str(tmp_path / "published.safetensors"), num_heads=4, decoder_num_heads=4)
    from_dict = convmae.load({"model": state}, num_heads=4, decoder_num_heads=4)
    assert all(torch.equal(a, b) for a, b in zip(from_file.parameters(), from_dict.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel_size": 7, "multi_scale": False, "in_channels": 1, "mlp_ratio": 2.0},
        {"norm_pix": False, "mask_ratio": 0.6, "image_size": (32, 96), "complementary_sets": 3},
    ],
)
def test_our_own_file_brings_back_the_whole_model(tmp_path, settings):
    model = convmae.ConvMAE(**{**TINY, **DECODER, **settings})
    weights.save(tmp_path / "model.safetensors", model.state_dict(), model.settings)
    back = convmae.load(tmp_path)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in back.settings.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in model.settings.items()
    }
    images = torch.randn(2, model.settings["in_channels"], *model.settings["image_size"])
    visible = model.draw_visible(images)
    assert torch.equal(model(images, visible).loss, back(images, visible).loss)


def test_sizes_are_read_from_the_tensors():
    model = convmae.ConvMAE(**{**TINY, **DECODER, "kernel_size": 9, "in_channels": 4, "mlp_ratio": 2.0})
    found = weights.sizes(model.state_dict())
    assert {name: model.settings[name] for name in found} == found


def test_a_classifier_comes_back_with_its_classes(tmp_path):
    model = convmae.Classifier(**TINY, num_classes=7).eval()
    weights.save(tmp_path / "c.safetensors", model.state_dict(), model.settings)
    back = convmae.load(tmp_path / "c.safetensors").eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), back(images))
    assert back.num_classes == 7


def test_published_file_of_ours_is_read_back(tmp_path):
    model = convmae.create_autoencoder("tiny", image_size=64)
    weights.save_published(tmp_path / "p.pth", model.state_dict())
    content = torch.load(tmp_path / "p.pth", weights_only=True)
    assert "patch_embed1.proj.weight" in content["model"]
    assert content["model"]["patch_embed1.proj.weight"].shape == (48, 3, 4, 4)
    back = convmae.load(tmp_path / "p.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("should-never-exist",)


def test_code_in_a_pickle_is_refused_and_not_run(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": published(golden), "args": Malicious()}, "bad.pth")
    with pytest.raises(convmae.UserError, match=r"bad.pth holds code \(\w+\.mkdir\), refused"):
        convmae.load("bad.pth")
    assert not (tmp_path / "should-never-exist").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_and_foreign_files_are_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(convmae.UserError, match="no weights at"):
        convmae.load(path)
    for nonsense in (b"not weights at all", b"root:x:0:0:root\n" * 20, b"", bytes(range(256))):
        path.write_bytes(nonsense)
        with pytest.raises(convmae.UserError, match="damaged"):
            convmae.load(path)
    foreign = {"layer.weight": torch.zeros(2, 2)}
    save_file(foreign, path) if name.endswith("safetensors") else torch.save(foreign, path)
    with pytest.raises(convmae.UserError, match="is no ConvMAE"):
        convmae.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    model = convmae.ConvMAE(**TINY, **DECODER)
    weights.save(tmp_path / "w.safetensors", model.state_dict(), model.settings)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(convmae.UserError, match="damaged"):
            convmae.load(path)


def test_of_a_run_the_best_model_is_meant_then_the_newest_checkpoint(tmp_path):
    order = ["checkpoints/step-00000020", "checkpoints/step-00000100", "best", "."]
    for place in order:  # each is preferred to those before it
        model = convmae.Classifier(**TINY, num_classes=order.index(place) + 2)
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        file = tmp_path / place / "model.safetensors"
        weights.save(file, model.state_dict(), model.settings)
        assert weights.locate(tmp_path) == weights.locate(file) == weights.locate(tmp_path / place) == file
        assert convmae.load(tmp_path).num_classes == order.index(place) + 2
    assert weights.locate(tmp_path / "checkpoints/step-00000020").parent.name == "step-00000020"


def test_a_best_folder_without_a_model_is_passed_over(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors.incomplete").write_bytes(b"half")
    with pytest.raises(convmae.UserError, match=r"no model.safetensors in"):
        weights.locate(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000007" / "model.safetensors"
    newest.parent.mkdir(parents=True)
    newest.touch()
    assert weights.locate(tmp_path) == newest


def test_an_empty_folder_and_a_dict_without_weights_are_refused(tmp_path):
    with pytest.raises(convmae.UserError, match=r"no model.safetensors in"):
        convmae.load(tmp_path)
    with pytest.raises(convmae.UserError, match="holds no weights"):
        convmae.load({"epoch": 3})


def test_our_format_is_plain_safetensors(tmp_path):
    model = convmae.ConvMAE(**TINY, **DECODER)
    weights.save(tmp_path / "w.safetensors", model.state_dict(), model.settings)
    assert load_file(tmp_path / "w.safetensors").keys() == model.state_dict().keys()
