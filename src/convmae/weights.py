"""Weights files: any wrapping to a clean state dict, published names to ours and back, sizes from shapes, safetensors.

Files and names only; `convmae.kinds` builds the models. A strided or pointwise convolution of the published
code is a matrix product here, so its weight changes shape along with its name: (D, C, f, f) <-> (D, f*f*C).
"""

import argparse
import json
import logging
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convmae.errors import UserError, check_local

_log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

MODEL_FILE = "model.safetensors"
_CONFIG_KEY = "convmae"

_BACKBONE = "backbone."  # before the encoder's names in mmsegmentation's files

_FIRST_LAYERS = {
    "patch_embed1.proj.weight": "",
    "encoder.downsample1.proj.weight": "",
    "downsample1.proj.weight": "encoder.",
}
"""The encoder's first layer as published, in a model of ours, and in an encoder of ours alone; what our names lack."""

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?!$)")
"""Parts of names that torch's wrappers of modules add: of several processes, of compiled code, of a moving average."""

_AVERAGE = re.compile(r"(?:^|[._])(?:ema|averaged?|avg|swa|polyak|teacher|momentum)(?:[._]|$)")
"""In the name under which a file holds weights: they are a moving average of others."""

_PLAIN = ("", "model.", "state_dict.", "model.state_dict.", "model_state_dict.", "net.", "network.", "params.")
"""Names under which a file holds the weights themselves, the first that is there counts."""

_PARTS = ("backbone.", "encoder.", "trunk.")
"""Last words of such a name where the encoder is a part of somebody's model, other parts of which are beside it."""

# Published name -> our name, up to the block number in the middle and `.weight` or `.bias` at the end.
_NAMES = [
    ("patch_embed{1,2,3}.", "encoder.downsample{1,2,3}."),
    ("patch_embed4.", "encoder.projection."),
    ("blocks{1,2}.*.conv1.", "encoder.stage{1,2}.*.pointwise1."),
    ("blocks{1,2}.*.attn.", "encoder.stage{1,2}.*.depthwise."),
    ("blocks{1,2}.*.conv2.", "encoder.stage{1,2}.*.pointwise2."),
    ("blocks{3}.*.attn.rel_pos_h", "encoder.stage{3}.*.attn.positions.height"),
    ("blocks{3}.*.attn.rel_pos_w", "encoder.stage{3}.*.attn.positions.width"),
    ("blocks{3}.*.attn.relative_position_bias_table", "encoder.stage{3}.*.attn.positions.table"),
    ("blocks{3}.*.gamma_1", "encoder.stage{3}.*.ls1.gamma"),
    ("blocks{3}.*.gamma_2", "encoder.stage{3}.*.ls2.gamma"),
    ("blocks{1,2,3}.", "encoder.stage{1,2,3}."),
    ("windowed_rel_pos_bias.relative_position_bias_table", "encoder.window_positions.table"),
    ("global_rel_pos_bias.relative_position_bias_table", "encoder.global_positions.table"),
    ("pos_embed", "encoder.pos_embed"),
    ("fpn.", "downsample4."),  # of the segmenter, whose heads are called alike in both
    ("stage1_output_decode.", "project1."),
    ("stage2_output_decode.", "project2."),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "decoder.prediction."),
    ("mask_token", "decoder.mask_token"),
]


def _rules(source: int) -> list[tuple[re.Pattern, str]]:
    """The table above as regular expressions, read from column `source` to the other one."""
    rules = []
    for pair in _NAMES:
        pattern = re.escape(pair[source]).replace(r"\*", r"(?P<block>\d+)")
        pattern = re.sub(r"\\{([\d,]+)\\}", lambda m: f"(?P<stage>[{m[1].replace(',', '')}])", pattern)
        target = re.sub(r"{[\d,]+}", r"\\g<stage>", pair[1 - source]).replace("*", r"\g<block>")
        rules.append((re.compile(pattern), target))
    return rules


_TO_OURS, _TO_PUBLISHED = _rules(0), _rules(1)


def _renamed(name: str, rules: list[tuple[re.Pattern, str]]) -> str:
    for pattern, target in rules:
        match = pattern.match(name)
        if match:
            return match.expand(target) + name[match.end() :]
    return name


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of the published code."""
    return "patch_embed1.proj.weight" in state


def is_segmenter(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a segmenter, ours or the published ones."""
    return "decode_head.conv_seg.weight" in state


def from_published(state: Mapping[str, Tensor]) -> StateDict:
    """Published names and shapes to ours. Other names pass through unchanged."""
    ours = {}
    for name, value in state.items():
        target = _renamed(name, _TO_OURS)
        if target.endswith("relative_position_index"):
            continue  # follows from the table's shape
        if value.ndim == 4 and _convolution_side(target):
            value = value.permute(0, 2, 3, 1).flatten(1)  # (D, C, f, f) -> (D, f*f*C)
        elif target.endswith("pos_embed"):
            side = _side(name, value.shape[1])
            value = value.unflatten(1, (side, side))  # (1, L, C) -> (1, H, W, C)
        elif target.endswith("positions.table"):
            side = _side(name, value.shape[0])
            value = value.unflatten(0, (side, side))  # (L, h) -> (2H - 1, 2W - 1, h)
        ours[target] = value.contiguous()
    return ours


def _side(name: str, places: int) -> int:
    """The side of a square table of so many places."""
    side = math.isqrt(places)
    if side * side != places:
        raise UserError(f"the positions '{name}' are {places}, no square: cannot be loaded")
    return side


def to_published(state: Mapping[str, Tensor]) -> StateDict:
    """Our names and shapes to the published ones, so that the authors' code can load them. Other names pass through."""
    published = {}
    for name, value in state.items():
        target = _renamed(name, _TO_PUBLISHED)
        side = _convolution_side(name)
        if side:
            value = value.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)  # (D, f*f*C) -> (D, C, f, f)
        elif name.endswith("pos_embed"):
            value = value.flatten(1, 2)
        elif name.endswith("positions.table"):
            value = value.flatten(0, 1)
        if is_segmenter(state) and name.startswith(("encoder.", "downsample4.")):
            target = _BACKBONE + target
        published[target] = value.contiguous()
    return published


def _convolution_side(name: str) -> int:
    """Kernel size of the published convolution behind one of our matrices; 0 where the layer was linear already."""
    sides = {
        r"encoder\.downsample1\.proj\.weight|project1\.weight": 4,
        r"encoder\.downsample[23]\.proj\.weight|project2\.weight": 2,
        r"encoder\.stage[12]\.\d+\.(pointwise[12]|mlp\.fc[12])\.weight": 1,
    }
    return next((side for pattern, side in sides.items() if re.fullmatch(pattern, name)), 0)


def read(path: str | Path) -> tuple[StateDict, dict[str, Any]]:
    """Read a weights file, whatever its wrapping, under our names.

    path: a safetensors file, a torch pickle of any wrapping (see `unwrap`), a folder of `save_pretrained`, a checkpoint
        folder or a run folder (its best model or newest checkpoint). Published and own names both work.

    Returns the state dict and what the file says of its model: our own files hold its description, those of earlier
    versions its settings as one dictionary, published ones at most `norm_pix` or the names of `classes`; see `flat`.
    Raises UserError for a missing, damaged or foreign file, and for a pickle that holds any code but what training
    scripts are known to put beside the weights, which is not run but passed over.
    """
    path = locate(Path(path))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_BESIDE_THE_WEIGHTS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"(?:GLOBAL|global)\s+[`']?([\w.]+)", str(error))
        reason = f"holds code ({forbidden[1]})" if forbidden else "is damaged or no weights file"
        raise UserError(f"{path} {reason}, refused: save plain tensors, or safetensors") from None
    except Exception as error:  # on bytes that are no pickle the reader raises errors of many types
        raise UserError(f"{path} is damaged or no weights file: download or save it again") from error
    return unwrap(content, str(path))


class _PassedOver:
    """Stands for an object of another library, which is neither needed nor made: it takes any arguments and state."""

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        """Passed over."""


class _PlainDictionary:
    """Stands for another kind of dictionary: what is made is a plain one, which then gets the entries."""

    def __new__(cls, *_: Any) -> OrderedDict:  # type: ignore[misc]  # the reader fills exactly this one and dict
        return OrderedDict()


def _called(stand_in: Any, names: Mapping[str, str]) -> list[tuple[Any, str]]:
    """The stand-in under all these names, modules and what is in them."""
    return [(stand_in, f"{module}.{name}") for module, inside in names.items() for name in inside.split()]


_PATHS = "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath"
_BESIDE_THE_WEIGHTS: list[Any] = [
    argparse.Namespace,
    (argparse.Namespace, "types.SimpleNamespace"),
    *_called(
        _PlainDictionary,
        {
            "addict.addict": "Dict",
            "collections": "defaultdict",
            "easydict": "EasyDict",
            "lightning.fabric.utilities.data": "AttributeDict",
            "lightning_fabric.utilities.data": "AttributeDict",
            "mmengine.config.config": "ConfigDict",
            "pytorch_lightning.utilities.parsing": "AttributeDict",
            "yacs.config": "CfgNode",
        },
    ),
    *_called(
        _PassedOver,
        {
            "builtins": "bool dict float frozenset getattr int list range slice str tuple",
            "datetime": "date datetime time timedelta timezone",
            "mmengine.config.config": "Config",
            "mmengine.logging.history_buffer": "HistoryBuffer",
            "numpy": "dtype ndarray",
            "numpy._core.multiarray": "_reconstruct scalar",
            "numpy._core.numeric": "_frombuffer",
            "numpy.core.multiarray": "_reconstruct scalar",
            "numpy.core.numeric": "_frombuffer",
            "omegaconf.base": "ContainerMetadata Metadata",
            "omegaconf.dictconfig": "DictConfig",
            "omegaconf.listconfig": "ListConfig",
            "omegaconf.nodes": "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode",
            "pathlib": _PATHS,
            "pathlib._local": _PATHS,
            "typing": "Any",
        },
    ),
]
"""What training scripts put beside the weights, by the names in a pickle. But for the first none is what it is called:
no class of them is made and no function called, so that a crafted file has nothing to work with."""


def unwrap(content: Any, origin: str = "the state dict") -> tuple[StateDict, dict[str, Any]]:
    """Take the state dict out of any usual wrapping and give it our names, and tell what comes with it; see `read`.

    content: a state dict, or dictionaries in which it lies at any depth and under any names; its own names may have any
        prefix, such as `model.`, and those of torch's wrappers, such as `module.`. Of weights and their moving average
        the average is taken, as timm does, and said.

    Raises UserError where there is no encoder of ours, or weights of several models none of which is the usual one.
    """
    found = _tensors_by_name(content, origin) if isinstance(content, Mapping) else {}
    if not found:
        raise UserError(f"{origin} holds no weights: expected a state dict, or one under 'model' or 'state_dict'")
    roots: dict[str, str] = {}
    for name in found:
        for first, lacking in _FIRST_LAYERS.items():
            root = name.removesuffix(first)
            if root != name and (not root or root.endswith(".")):
                roots[root] = lacking
                break
    if not roots:
        raise UserError(f"{origin} is no ConvMAE: it lacks the encoder's first layer; pass a ConvMAE weights file")
    root = _chosen(sorted(roots), found, origin)
    state = {roots[root] + name.removeprefix(root): value for name, value in found.items() if name.startswith(root)}
    if root.endswith(_PARTS):
        parent = root[: root[:-1].rfind(".") + 1]
        beside = {
            name.removeprefix(parent): value
            for name, value in found.items()
            if name.startswith(parent) and not name.startswith(tuple(roots))
        }
        if is_published(state) and root.endswith(_BACKBONE):  # in such a file heads have the names that they have here
            state = {**beside, **state}
        elif beside:
            parts = sorted({name.split(".")[0] for name in beside})
            _log.warning("%s: all but the encoder is left out, %d tensors of %s", origin, len(beside), ", ".join(parts))
    if is_published(state):
        state = from_published(state)
    return state, _facts_beside(content)


def _tensors_by_name(content: Mapping[str, Any], origin: str) -> StateDict:
    """All tensors under names that are joined over nested dictionaries, without what torch's wrappers add to them."""
    found: StateDict = {}

    def gather(level: Mapping[str, Any], prefix: str) -> None:
        for key, value in level.items():
            if not isinstance(key, str) or key.startswith("optim"):
                continue
            if isinstance(value, Tensor):
                name = _WRAPPERS.sub("", prefix + key)
                if name in found:
                    raise UserError(f"{origin} holds {name} twice: save the weights that you mean by themselves")
                found[name] = value
            elif isinstance(value, Mapping):
                gather(value, f"{prefix}{key}.")

    gather(content, "")
    return found


def _chosen(roots: list[str], found: Mapping[str, Tensor], origin: str) -> str:
    """Under which of several names the weights lie that are meant."""
    if len(roots) == 1:
        return roots[0]
    averages = [root for root in roots if _AVERAGE.search(root) or f"{root}n_averaged" in found]
    plain = [root for root in _PLAIN if root in roots and root not in averages]
    called = ", ".join(repr(root.removesuffix(".")) if root else "no name" for root in roots)
    if len(averages) > 1 or not (averages or plain):
        raise UserError(
            f"{origin} holds weights of several models, under {called}: save those that you mean by themselves"
        )
    root = (averages or plain)[0]
    what = "the moving average" if averages else "those"
    _log.warning("%s holds weights under %s; taken: %s under %r", origin, called, what, root.removesuffix("."))
    return root


def _facts_beside(content: Mapping[str, Any]) -> dict[str, Any]:
    """What dictionaries around the weights say of the model: the authors', mmsegmentation's, and ours in that form."""
    facts: dict[str, Any] = {}
    levels = [content]
    for level in levels:  # which grows
        arguments, meta = level.get("args"), level.get("meta")
        if isinstance(arguments, argparse.Namespace):
            arguments = vars(arguments)
        if isinstance(arguments, Mapping) and isinstance(arguments.get("norm_pix_loss"), bool | int):
            facts.setdefault("norm_pix", bool(arguments["norm_pix_loss"]))
        if isinstance(meta, Mapping) and isinstance(meta.get("CLASSES"), list | tuple):
            # "bed " among ADE20K's
            facts.setdefault("classes", [str(name).strip() for name in meta["CLASSES"]])
        if isinstance(meta, Mapping) and isinstance(meta.get("reduce_zero_label"), bool):
            facts.setdefault("reduce_zero_label", meta["reduce_zero_label"])
            if isinstance(meta.get("label_encoding"), Mapping):
                facts.setdefault("label_encoding", dict(meta["label_encoding"]))
        levels += [value for value in level.values() if isinstance(value, Mapping)]
    return facts


def locate(path: Path) -> Path:
    """The weights file that a path means: itself, the one in a checkpoint folder, or a run's.

    Of a run's files that is the best model, where the run keeps one, else that of the newest checkpoint.
    """
    if path.is_file():
        return path
    if not path.exists():
        check_local(
            "weights",
            path,
            "download the file and give its path; from the Hugging Face Hub, in Python, "
            "convmae.ConvViT.from_pretrained('user/name').save_pretrained(FOLDER)",
        )
        raise UserError(f"no weights at {path}: check the path")
    for file in (path / MODEL_FILE, path / "best" / MODEL_FILE):
        if file.is_file():
            return file
    # A process that was killed while writing leaves a folder whose name goes on after the step.
    newest = sorted(file for file in path.glob(f"checkpoints/step-*/{MODEL_FILE}") if file.parent.name[5:].isdecimal())
    if not newest:
        raise UserError(f"no {MODEL_FILE} in {path} or its checkpoints: pass a weights file or a run folder")
    return newest[-1]


def save(path: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write our own format: safetensors, with a model's description as JSON in the header; see `Described`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, path, metadata={"format": "pt", _CONFIG_KEY: json.dumps(dict(config))})


class Described(Protocol):
    """A model that says what it is."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Its kind under "kind", the fields of its encoder's configuration under "encoder", its own under "head"."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Its tensors by name."""


def save_model(path: str | Path, model: Described) -> None:
    """Write a model in our own format, so that `convmae.load` builds the same one."""
    save(path, model.state_dict(), model.description)


def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a file or a model says of itself as one dictionary of settings; of two of a name the head's counts."""
    if "kind" not in facts:  # written by an earlier version, or published
        return dict(facts)
    return {**facts["encoder"], **facts.get("head", {})}


def check(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """Raise UserError, which names the first that does not fit, unless `state` has exactly the tensors of `model`."""
    for name, own in model.items():
        if name not in state:
            raise UserError(f"the weights do not fit the model: the file lacks {name}; check the model's settings")
        if own.shape != state[name].shape:
            raise UserError(
                f"the weights do not fit the model: {name} is {tuple(state[name].shape)} in the file and "
                f"{tuple(own.shape)} in the model; check the model's settings"
            )
    for name in state:
        if name not in model:
            raise UserError(
                f"the weights do not fit the model: the file has {name} besides; check the model's settings"
            )


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict under our names into a model that has exactly its tensors; raises UserError where not."""
    check(state, model.state_dict())
    model.load_state_dict(dict(state))


def save_published(path: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> None:
    """Write a torch file under the published names, as the authors' code reads it, or mmsegmentation a segmenter's.

    config: settings of the model, of which a segmenter's file keeps the classes and how label maps write them.
    """
    published = to_published({name: value.detach().cpu() for name, value in state.items()})
    if not is_segmenter(state):
        torch.save({"model": published}, path)
        return
    named = {"classes": "CLASSES", "reduce_zero_label": "reduce_zero_label", "label_encoding": "label_encoding"}
    known = {named[name]: value for name, value in (config or {}).items() if name in named and value is not None}
    # mmsegmentation knows no "model": it would load nothing, and not fail.
    torch.save({"meta": known, "state_dict": published}, path)


def _read_safetensors(path: Path) -> tuple[StateDict, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(_CONFIG_KEY, "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: download or save it again") from error
    if "kind" in config:
        return state, config
    state, facts = unwrap(state, str(path))
    return state, facts | _facts_of_timm(path.with_name("config.json"), state) | config


def _facts_of_timm(path: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What timm writes beside a classifier of ours; nothing where it did not."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not str(told["architecture"]).startswith("convmae_"):
            return {}
        cfg, arguments, classes = told.get("pretrained_cfg", {}), told.get("model_args") or {}, told.get("label_names")
        facts = {"num_heads": arguments.get("num_heads"), "crop_pct": cfg.get("crop_pct"), "classes": classes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no such file, or another program's
        return {}
    if "head.weight" not in state or not isinstance(classes, list) or len(classes) != len(state["head.weight"]):
        del facts["classes"]
    return {name: value for name, value in facts.items() if value is not None}


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a model that its tensors' shapes tell; numbers of attention heads are not among them.

    Raises UserError that names a tensor of the encoder that is not there.
    """
    telling = [f"encoder.stage{stage}.0.mlp.fc1.bias" for stage in (1, 2, 3)]
    for name in (*_TELLING, *telling):
        if name not in state:
            raise UserError(f"the weights are not whole: they lack {name}; save or download the file again")

    def depth(part: str) -> int:
        return 1 + max(int(m[1]) for name in state if (m := re.match(rf"{re.escape(part)}\.(\d+)\.", name)))

    widths = tuple(state[f"encoder.downsample{stage}.proj.bias"].shape[0] for stage in (1, 2, 3))
    ratios = tuple(_ratio(state[name].shape[0], width) for name, width in zip(telling, widths, strict=True))
    grid = state["encoder.pos_embed"].shape[1:3]
    found: dict[str, Any] = {
        "image_size": (16 * grid[0], 16 * grid[1]),
        "in_channels": state["encoder.downsample1.proj.weight"].shape[1] // 16,
        "widths": widths,
        "depths": tuple(depth(f"encoder.stage{stage}") for stage in (1, 2, 3)),
        "mlp_ratio": ratios[0] if len(set(ratios)) == 1 else ratios,
        "kernel_size": state["encoder.stage1.0.depthwise.weight"].shape[-1],
    }
    if "decoder.mask_token" in state:
        found["decoder_width"] = state["decoder.mask_token"].shape[-1]
        found["decoder_depth"] = depth("decoder.blocks")
        found["multi_scale"] = "project1.weight" in state
    elif "head.weight" in state:
        found["num_classes"] = state["head.weight"].shape[0]
    elif is_segmenter(state):
        found["num_classes"], found["head_width"] = state["decode_head.conv_seg.weight"].shape[:2]
        if "auxiliary_head.conv_seg.weight" in state:
            found["auxiliary_width"] = state["auxiliary_head.conv_seg.weight"].shape[1]
    return found


_TELLING = (
    *(f"encoder.downsample{stage}.proj.{part}" for stage in (1, 2, 3) for part in ("weight", "bias")),
    "encoder.stage1.0.depthwise.weight",
    "encoder.pos_embed",
)
"""Tensors whose shapes tell the settings of an encoder."""


def _ratio(hidden: int, width: int) -> float:
    """The ratio that makes so many hidden channels of so many, which are cut to a whole number."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
