"""Every format is read back by the program that it is for, and gives the same logits."""

import json
import sys

import onnx
import onnxruntime
import pytest
import timm
import torch

import convmae
from convmae import weights
from convmae.commands.export import export

SMALL = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 4, "image_size": 32}  # those of conftest


def images(batch, size=32, channels=3):
    return torch.randn(batch, channels, size, size)


def run_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def run_program(path, x):
    return torch.export.load(path).module()(x)


GRAPHS = pytest.mark.parametrize(
    ("format", "name", "run"), [("onnx", "m.onnx", run_onnx), ("torch-export", "m.pt2", run_program)]
)


@GRAPHS
def test_a_graph_gives_the_logits_for_any_batch(named_classifier_file, tmp_path, format, name, run):
    path = export(named_classifier_file, format, tmp_path / "new" / name)
    assert [file.name for file in path.parent.iterdir()] == [name]
    model = convmae.load(named_classifier_file).eval()
    for batch in (1, 2, 5):
        x = images(batch)
        torch.testing.assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-4)


@GRAPHS
def test_without_a_head_it_gives_features_at_the_size_asked_for(grey_autoencoder_file, tmp_path, format, name, run):
    path = export(grey_autoencoder_file, format, str(tmp_path / name), image_size=64)
    model = convmae.load_classifier(grey_autoencoder_file, image_size=64).eval()
    x = images(3, 64, channels=1)
    got = run(path, x)
    assert got.shape == (3, 32)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


def test_graphs_carry_what_their_user_must_know(named_classifier_file, tmp_path):
    path = export(named_classifier_file, "onnx", tmp_path / "m.onnx")
    graph = onnx.load(path)
    facts = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert facts["classes"] == ["cat", "dog", "[b]owl"]
    assert facts["mean"] == pytest.approx([0.485, 0.456, 0.406])  # ImageNet's
    assert {node.domain for node in graph.graph.node} == {""}  # ONNX's own operations only
    assert [value.name for value in (*graph.graph.input, *graph.graph.output)] == ["images", "logits"]
    path = export(named_classifier_file, "torch-export", tmp_path / "m.pt2")
    extra = {"classes": "", "std": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["classes"]) == ["cat", "dog", "[b]owl"]
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") or "getitem" in name for name in operations), operations
    assert not any("upsample" in name for name in operations)  # of positions that fit already


@pytest.mark.parametrize("settings", [{}, {"kernel_size": 3, "mlp_ratio": 2.0, "in_channels": 1, "crop_pct": 0.5}])
def test_timm_reads_its_folder(tmp_path, settings):
    model = convmae.Classifier(**{**SMALL, "num_classes": 3, "classes": ["a", "b", "c"], **settings}).eval()
    weights.save_model(tmp_path / "w.safetensors", model)
    folder = export(tmp_path / "w.safetensors", "timm", tmp_path / "for" / "timm")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    back = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(2, channels=model.in_chans)
    assert torch.equal(back(x), model(x))
    assert back.classes == model.classes
    assert back.pretrained_cfg["label_names"] == model.classes
    assert torch.equal(convmae.load(folder).eval()(x), model(x))
    data = timm.data.resolve_model_data_config(back)
    assert tuple(data["input_size"]) == (model.in_chans, 32, 32)
    assert len(data["mean"]) == model.in_chans
    assert data["crop_pct"] == back.crop_pct == model.crop_pct
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).eval()
    assert other(x).shape == (2, 5)
    assert other.classes is None
    assert torch.equal(other.forward_features(x), model.forward_features(x))


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_named_sizes_keep_their_name(tmp_path, size):
    with torch.device("meta"):
        settings = convmae.create_classifier(size, image_size=32, num_classes=0).settings
    from convmae.commands.export import _timm_model

    assert _timm_model(settings) == (f"convmae_{size}", {"img_size": (32, 32)})


def test_the_reference_has_the_published_names(autoencoder_file, classifier_file, tmp_path):
    for source in (autoencoder_file, classifier_file):
        path = export(source, "reference", tmp_path / f"{source.stem}.pth")
        state = torch.load(path, weights_only=True)["model"]
        assert state["patch_embed1.proj.weight"].shape == (16, 3, 4, 4)
        assert state["pos_embed"].shape == (1, 4, 32)
        model = convmae.load(source).eval()
        back = convmae.load(path, num_heads=4).eval()
        assert type(back) is type(model)
        assert back.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    x = images(2)
    assert torch.equal(back(x), model(x))


def test_mistakes_are_one_line_and_leave_nothing(classifier_file, tmp_path, monkeypatch):
    wide = convmae.Classifier(**{**SMALL, "image_size": (32, 48)})
    weights.save_model(tmp_path / "wide.safetensors", wide)
    (tmp_path / "foreign.pth").write_bytes(b"no weights")
    out = tmp_path / "out"
    for arguments, message in (
        ((classifier_file, "coreml", out / "m.mlmodel"), "format cannot be 'coreml': choose one of onnx"),
        ((classifier_file, "onnx", out / "m.pt2"), r"ends in \.onnx"),
        ((classifier_file, "torch-export", out / "m.onnx"), r"ends in \.pt2"),
        ((classifier_file, "reference", out / "m.safetensors"), r"ends in \.pth or \.pt"),
        ((tmp_path / "nothing", "timm", out / "folder"), "no weights at"),
        ((tmp_path / "foreign.pth", "onnx", out / "m.onnx"), "is damaged"),
        ((classifier_file, "onnx", out / "m.onnx", 40), "not divisible by 16"),
        ((tmp_path / "wide.safetensors", "reference", out / "m.pth"), "square images, the weights are for 32x48"),
        ((classifier_file, "timm", tmp_path / "foreign.pth"), "is a file"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            export(*arguments)
        assert "\n" not in str(error.value)
        assert [path for path in out.rglob("*") if path.is_file()] == []
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(convmae.UserError, match=r"onnxscript is not installed: pip install 'convmae\[export\]'"):
        export(classifier_file, "onnx", out / "m.onnx")


OUTPUTS = {"onnx": "m.onnx", "torch-export": "m.pt2", "timm": "folder", "reference": "m.pth"}


@pytest.mark.parametrize("format", OUTPUTS)
@pytest.mark.parametrize("older", [False, True])
def test_heads_that_a_format_cannot_hold_are_refused(tmp_path, format, older):
    encoder = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 4}
    detector = convmae.Detector((64, 64), num_classes=2, head_width=8, box_width=8, **encoder)
    segmenter = convmae.Segmenter((64, 64), num_classes=2, head_width=8, auxiliary_width=8, **encoder)
    for model, kind, cure in (
        (detector, "a detector", "convmae detect predict"),
        (segmenter, "a segmenter", "--format reference writes it whole"),
    ):
        file, output = tmp_path / "w.safetensors", tmp_path / kind / OUTPUTS[format]
        weights.save(file, model.state_dict(), model.settings if older else model.description)
        if model is segmenter and format == "reference":
            back = convmae.load(export(file, format, output), num_heads=4)
            assert torch.equal(back.decode_head.conv_seg.weight, model.decode_head.conv_seg.weight)
            continue
        with pytest.raises(convmae.UserError, match=f"holds {kind}, which {format} cannot hold: .*{cure}") as error:
            export(file, format, output)
        assert "\n" not in str(error.value)
        assert not output.is_file()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


@pytest.mark.parametrize(("format", "name"), [("reference", "m.pth"), ("timm", "folder")])
def test_nothing_is_overwritten_unasked(classifier_file, tmp_path, format, name):
    output = export(classifier_file, format, tmp_path / name)
    file = output / "config.json" if format == "timm" else output
    file.write_text("the user's")
    with pytest.raises(convmae.UserError, match="exists: replace it with --overwrite"):
        export(classifier_file, format, output)
    assert file.read_text() == "the user's"
    if format == "timm":
        (output / "notes.txt").write_text("the user's")
    export(classifier_file, format, output, overwrite=True)
    assert file.read_bytes() != b"the user's"
    assert format != "timm" or (output / "notes.txt").read_text() == "the user's"
