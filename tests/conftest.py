"""What test files of several folders share: golden values, small data, tiny weights, ways to compare and to run."""

import os
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import load_file

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports triton, whose own functions take it from there

# Compiled code is kept by the forward alone: of another version of an operator's backward torch would find the old one.
_compiled = tempfile.TemporaryDirectory()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

# What was found in label maps is kept in the user's cache, in which tests leave nothing.
_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name

import convmae  # noqa: E402
from convmae import cli, weights  # noqa: E402
from convmae.data.scenes import SHAPES, draw_scene, write_scenes  # noqa: E402

settings.register_profile("fixed", derandomize=True)  # what is drawn today is drawn tomorrow
settings.load_profile("fixed")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Read a golden file: golden("pretrain_tiny") -> dict of tensors."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Models this small gain nothing from a second thread, and wait long for it on a busy machine."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def at_step(monkeypatch):
    """Inside at_step(n), something happens in the midst of a run's n-th step: SIGTERM, or what is given."""
    from convmae.training.logging import RunLog

    @contextmanager
    def happens(number, event=lambda: os.kill(os.getpid(), signal.SIGTERM)):
        original = RunLog.advance

        def advance(log, step, epoch):
            original(log, step, epoch)
            if step == number:
                event()

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "advance", advance)
            yield

    return happens


# Ways to compare and to run


@pytest.fixture(scope="session")
def same():
    """same(a, b): whether two nested structures of tensors and plain values hold exactly the same."""

    def compare(a, b):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(compare(a[key], b[key]) for key in a)
        if isinstance(a, list | tuple):
            return type(a) is type(b) and len(a) == len(b) and all(map(compare, a, b))
        return a == b or (a != a and b != b)  # neither is a number

    return compare


@pytest.fixture(scope="session")
def files_of():
    """files_of(folder) -> the bytes of all files below it by their paths."""
    return lambda folder: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def command_line(capsys):
    """command_line("info", "--model", "tiny") -> exit status, standard output, standard error, run in this process."""

    def run(*arguments):
        capsys.readouterr()
        status = 0
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command_line, tmp_path, monkeypatch):
    """refused(message, *arguments): the command line ends with status 2 and one line with the message.

    The working folder is the test's own, and nothing is written into it.
    """
    monkeypatch.chdir(tmp_path)

    def check(message, *arguments):
        before = set(tmp_path.rglob("*"))
        status, out, err = command_line(*arguments)
        assert status == 2
        assert message in err
        assert err.startswith("convmae: ")
        assert err.count("\n") == 1
        assert out == ""
        assert set(tmp_path.rglob("*")) == before

    return check


# Small data; treat what is of the session as read-only


@pytest.fixture(scope="session")
def write_photographs():
    """write_photographs(folder, [("a/1.png", (W, H)), ...]): smooth pictures, each another one."""

    def write(folder, files):
        numbers = np.random.default_rng(0)
        for name, size in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            coarse = numbers.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / name)
        return folder

    return write


@pytest.fixture(scope="session")
def photographs(write_photographs, tmp_path_factory):
    """A folder of ten small images of different shapes, in nested folders."""
    files = [(f"{('a', 'b/c')[index % 2]}/{index}.png", (40 + 3 * index, 50)) for index in range(10)]
    return write_photographs(tmp_path_factory.mktemp("photographs") / "images", files)


@pytest.fixture(scope="session")
def write_classes():
    """write_classes(folder, {"train": 8, "val": 3}, {"azure": (40, 120, 230), ...}, shades=0, noise=40).

    folder/SPLIT/CLASS/N.png: noise around a class's colour, or around a shade of it, so that classes overlap.
    """

    def write(folder, splits, colours, shades=0, noise=40, numbers=None):
        numbers = np.random.default_rng(0) if numbers is None else numbers
        for split, count in splits.items():
            for name, colour in colours.items():
                (folder / split / name).mkdir(parents=True)
                for index in range(count):
                    shade = numbers.normal(colour, shades) if shades else colour
                    pixels = numbers.normal(shade, noise, (36, 40, 3)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / split / name / f"{index:02d}.png")
        return folder

    return write


@pytest.fixture(scope="session")
def labelled(write_classes, tmp_path_factory):
    """Six classes of coloured noise, 8 images each, 3 for validation; one crimson image lies among the brown ones."""
    colours = {
        "azure": (40, 120, 230),
        "brown": (120, 70, 30),
        "crimson": (220, 30, 60),
        "green": (40, 160, 60),
        "white": (225, 225, 225),
        "yellow": (230, 210, 50),
    }
    folder = write_classes(tmp_path_factory.mktemp("classes") / "labelled", {"train": 8, "val": 3}, colours)
    (folder / "val/brown/00.png").write_bytes((folder / "val/crimson/00.png").read_bytes())
    return folder


@pytest.fixture(scope="session")
def coco_scenes(tmp_path_factory):
    """12 and 20 generated scenes of 64 x 64, of which one to be judged has no objects."""
    return write_scenes(tmp_path_factory.mktemp("coco") / "scenes", "coco", 12, 20, (64, 64))


@pytest.fixture(scope="session")
def ade20k_scenes(tmp_path_factory):
    """12 and 6 generated scenes of 64 x 96, which is more than a window of training."""
    return write_scenes(tmp_path_factory.mktemp("ade20k") / "scenes", "ade20k", 12, 6, (64, 96))


@pytest.fixture
def streams(monkeypatch, tmp_path):
    """Hugging Face's data sets, with their cache in a folder of the test's."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# Tiny weights files


_SMALL = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 4}


def _trained(create, folder, name, **settings):
    """A weights file whose features differ visibly between images, as those of a trained model do."""
    torch.manual_seed(0)
    model = create("tiny", **_SMALL, image_size=32, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    path = folder / f"{name}.safetensors"
    weights.save_model(path, model)
    return path


@pytest.fixture(scope="session")
def autoencoder_file(tmp_path_factory):
    """Weights file of a tiny autoencoder for images of 32 x 32."""
    return _trained(convmae.create_autoencoder, tmp_path_factory.mktemp("weights"), "autoencoder")


@pytest.fixture(scope="session")
def grey_autoencoder_file(tmp_path_factory):
    """The same for grey images."""
    return _trained(convmae.create_autoencoder, tmp_path_factory.mktemp("weights"), "grey", in_channels=1)


@pytest.fixture(scope="session")
def classifier_file(tmp_path_factory):
    """Weights file of a tiny classifier of three classes without names."""
    return _trained(convmae.create_classifier, tmp_path_factory.mktemp("weights"), "classifier", num_classes=3)


@pytest.fixture(scope="session")
def named_classifier_file(tmp_path_factory):
    """The same with names."""
    folder = tmp_path_factory.mktemp("weights")
    return _trained(convmae.create_classifier, folder, "named", num_classes=3, classes=["cat", "dog", "[b]owl"])


def _untrained_detector(path, form):
    torch.manual_seed(0)
    detector = convmae.Detector(
        (64, 64),
        num_classes=len(SHAPES),
        form=form,
        **_SMALL,
        pos_embed_size=(32, 32),
        window=2,
        head_width=16,
        box_width=32,
        anchor_sizes=(16, 32, 64, 128, 256),
        proposals=50,
        rois=16,
    )
    weights.save_model(path, detector)
    return path


@pytest.fixture(scope="session")
def paper_file(tmp_path_factory):
    """Weights file of a detector of the paper's form, so small that a step takes a tenth of a second."""
    return _untrained_detector(tmp_path_factory.mktemp("weights") / "paper.safetensors", "paper")


@pytest.fixture(scope="session")
def vitdet_file(tmp_path_factory):
    """The same of ViTDet's form."""
    return _untrained_detector(tmp_path_factory.mktemp("weights") / "vitdet.safetensors", "vitdet")


@pytest.fixture(scope="session")
def write_segmenter():
    """write_segmenter(path, **settings): weights of a segmenter as small, which sees all its classes."""

    def write(path, **settings):
        torch.manual_seed(0)
        classes = ["background", *SHAPES]
        settings = {"num_classes": len(classes), "classes": classes, **settings}
        segmenter = convmae.Segmenter((64, 64), **_SMALL, head_width=16, auxiliary_width=8, **settings)
        scores = segmenter.decode_head.conv_seg
        with torch.no_grad():
            scores.weight.normal_()
            image = torch.from_numpy(draw_scene(0, (64, 64)).image).permute(2, 0, 1)[None, : segmenter.in_channels]
            scores.bias.sub_(segmenter.eval()(image).mean(dim=(0, 2, 3)))  # else one class is ahead everywhere
        weights.save_model(path, segmenter)
        return path

    return write


@pytest.fixture(scope="session")
def segmenter_file(write_segmenter, tmp_path_factory):
    """Weights file of a segmenter of the generated scenes' classes."""
    return write_segmenter(tmp_path_factory.mktemp("weights") / "segmenter.safetensors")


@pytest.fixture(scope="session")
def reduced_file(write_segmenter, tmp_path_factory):
    """The same of data whose label 0 is no class."""
    path = tmp_path_factory.mktemp("weights") / "reduced.safetensors"
    return write_segmenter(path, num_classes=len(SHAPES), classes=list(SHAPES), reduce_zero_label=True)
