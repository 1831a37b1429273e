"""`convmae export`: a model in the form that another program reads."""

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from convmae import weights as weights_files
from convmae.commands.frozen import checked_output
from convmae.errors import UserError, check_choice
from convmae.kinds import kind_of, load, load_classifier
from convmae.models.classifier import Classifier
from convmae.models.config import PATCH, grid_of
from convmae.models.detector import Detector
from convmae.models.segmenter import Segmenter
from convmae.models.sizes import ENCODERS
from convmae.models.timm import default_cfgs
from convmae.objectives.masked import ConvMAE
from convmae.pixels import Pixels

_SUFFIXES = {"onnx": (".onnx",), "torch-export": (".pt2",), "reference": (".pth", ".pt")}


def export(
    weights: Path,
    format: Literal["onnx", "torch-export", "timm", "reference"],
    output: Path,
    image_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model in the form that another program reads.

    onnx and torch-export hold a graph from images, normalised float (B, C, H, W) with any B, to logits (B, classes),
    or to pooled features (B, C3) where the weights have no head; it names the classes and says how to normalise. timm
    is a folder for timm.create_model("local-dir:FOLDER", pretrained=True) after `import convmae`. reference is a file
    for the authors' code, under the published names: the whole autoencoder, classifier or segmenter. No format holds a
    detector.

    Args:
        weights: a run's folder, a checkpoint or a weights file, ours or published.
        format: onnx, torch-export, timm or reference.
        output: the file, whose name ends in .onnx, .pt2 or .pth; for timm a folder.
        image_size: side of the square images that it is for, a multiple of 16; by default those of the weights.
        overwrite: replace the output if it exists.

    Returns the path of the output. Raises UserError for weights or an output that cannot work.
    """
    check_choice("format", format, (*_SUFFIXES, "timm"))
    output = _checked(Path(output), format, overwrite)  # Python callers may pass a string
    if format == "onnx":
        _check_onnx()
    kind = kind_of(weights)
    if format not in kind.exports:
        raise UserError(f"{weights} holds {kind.called}, which {format} cannot hold: {kind.instead}")
    settings: dict[str, Any] = {}
    if image_size is not None:
        grid_of((image_size, image_size))
        settings["image_size"] = (image_size, image_size)
    pooled = {**settings, "global_pool": "avg"}  # whatever the weights were saved without
    folder = output if format == "timm" else output.parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        file = Path(temporary) / output.name
        match format:
            case "onnx":
                _write_onnx(file, load_classifier(weights, **pooled).eval())
            case "torch-export":
                _write_program(file, load_classifier(weights, **pooled).eval())
            case "timm":
                _write_timm(file.parent, load_classifier(weights, **settings))
            case "reference":
                _write_reference(file, load(weights, **settings))
        for written in Path(temporary).iterdir():  # only now, whole, in the place of an older one
            written.replace(folder / written.name)
    Console().print(f"{weights} for {format}: {output}", markup=False, soft_wrap=True)
    return output


def _checked(output: Path, format: str, overwrite: bool) -> Path:
    """The output's path, when it may be written."""
    if format != "timm":
        checked_output(output, _SUFFIXES[format])
        taken = output.exists()
    else:
        if output.is_file():
            raise UserError(f"{output} is a file: choose the name of a folder")
        checked_output(output / weights_files.MODEL_FILE, (".safetensors",))
        taken = any(output.iterdir())
    if taken and not overwrite:
        raise UserError(f"{output} exists: replace it with --overwrite, or choose another --output")
    return output


def _check_onnx() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(f"{package} is not installed: pip install 'convmae[export]'") from error


def _write_onnx(path: Path, model: Classifier) -> None:
    program = torch.onnx.export(
        model,
        (_example(model),),
        input_names=["images"],
        output_names=[_result(model)],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(_metadata(model))
    program.save(path)


def _write_program(path: Path, model: Classifier) -> None:
    program = torch.export.export(model, (_example(model),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files=_metadata(model))


def _write_timm(folder: Path, model: Classifier) -> None:
    """Files as timm's own: config.json, and weights, which `convmae.load` takes too."""
    settings = model.settings
    height, width = model.image_size
    name, arguments = _timm_model(settings)
    cfg = default_cfgs[name].default.to_dict(remove_source=True)
    cfg |= {
        "num_classes": model.num_classes,
        "input_size": [model.in_channels, height, width],
        "pool_size": [height // PATCH, width // PATCH],
        "crop_pct": model.crop_pct,
        **_normalisation(model),
    }
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }
    if model.classes:
        config["label_names"] = model.classes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights_files.save_model(folder / weights_files.MODEL_FILE, model)


def _timm_model(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name of a model of these settings, and the arguments that make it so."""
    own = {name: settings[name] for name in ("widths", "depths", "num_heads")}
    size = next((size for size, known in ENCODERS.items() if own.items() <= known.settings.items()), None)
    arguments = {} if size else own
    arguments["img_size"] = settings["image_size"]
    usual = {"mlp_ratio": 4.0, "kernel_size": 5, "global_pool": "avg", "crop_pct": 224 / 256}
    arguments |= {name: settings[name] for name, value in usual.items() if settings[name] != value}
    if Pixels.of(settings["pixels"]) != Pixels():
        arguments["pixels"] = settings["pixels"]
    return f"convmae_{size or 'base'}", arguments


def _write_reference(path: Path, model: ConvMAE | Classifier | Detector | Segmenter) -> None:
    height, width = model.image_size
    if height != width:
        raise UserError(
            f"the authors' code takes square images, the weights are for {height}x{width}: set --image_size"
        )
    weights_files.save_published(path, model.state_dict(), model.settings)


def _example(model: Classifier) -> torch.Tensor:
    """Images (2, C, H, W); with one image the graph would be for one only."""
    return torch.zeros(2, model.in_channels, *model.image_size)


def _result(model: Classifier) -> str:
    return "logits" if model.num_classes else "features"


def _metadata(model: Classifier) -> dict[str, str]:
    """What a user of the graph must know, as JSON: the order of the classes, how to normalise, the model's settings."""
    facts = {"classes": model.classes, **_normalisation(model), "convmae": model.settings}
    return {name: json.dumps(value) for name, value in facts.items()}


def _normalisation(model: Classifier) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel, as timm names them; of float32 the digits that it has."""
    normalize = model.encoder.normalize
    return {
        name: [round(value, 6) for value in values.flatten().tolist()]
        for name, values in (("mean", normalize.mean), ("std", normalize.std))
    }
