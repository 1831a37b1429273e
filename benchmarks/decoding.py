"""How fast one thread turns JPEG files into random 224x224 crops in several ways, and how far they differ.

python benchmarks/decoding.py [--rounds 7] [--json_file decoding.json]

The files are the demo photographs (pip install 'convmae[demo]') at the stated size with a little noise. Every
way does the whole job with the same random numbers: open, decode, crop, resize (bicubic, antialiased), flip,
uint8 tensor. The ways take turns within each round; the table gives the medians over the rounds.
"""

import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from convmae.data.demo import demo_photographs
from convmae.data.images import RandomCrop

SIZES = ((500, 375), (2000, 1500), (4000, 3000))  # ImageNet's average, the web's, a phone's
SIDE = 224

_crop = v2.RandomResizedCrop((SIDE, SIDE), (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
_flip = v2.RandomHorizontalFlip()
_shipped = RandomCrop((SIDE, SIDE))


def pillow(encoded: bytes) -> Tensor:
    """Everything in Pillow, all pixels decoded: the plain path that the others are compared with."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    return functional.pil_to_tensor(_flip(_crop(image)))


def pillow_box(encoded: bytes) -> Tensor:
    """Pillow decodes all pixels and resamples only the crop."""
    image = Image.open(io.BytesIO(encoded))
    crop = _crop.make_params([image])
    box = (crop["left"], crop["top"], crop["left"] + crop["width"], crop["top"] + crop["height"])
    resized = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return functional.pil_to_tensor(_flip(resized))


def pillow_draft_box(encoded: bytes) -> Tensor:
    """Pillow decodes a large JPEG at a reduced size and resamples only the crop."""
    image = Image.open(io.BytesIO(encoded))
    crop = _crop.make_params([image])
    width, height = image.size
    wanted = (2 * SIDE * width / crop["width"], 2 * SIDE * height / crop["height"])
    image.draft("RGB", (math.ceil(wanted[0]), math.ceil(wanted[1])))
    scale = image.width / width
    right, bottom = crop["left"] + crop["width"], crop["top"] + crop["height"]
    box = [scale * edge for edge in (crop["left"], crop["top"], right, bottom)]
    box[2:] = min(box[2], image.width), min(box[3], image.height)
    resized = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=tuple(box))
    return functional.pil_to_tensor(_flip(resized))


def torchvision_tensor(encoded: bytes) -> Tensor:
    """torchvision decodes all pixels to a tensor; the crop is resampled as a tensor."""
    pixels = decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    return _flip(_crop(pixels))


def pillow_draft_tensor(encoded: bytes) -> Tensor:
    """Pillow decodes a large JPEG at a reduced size; the crop is resampled as a tensor: what convmae does."""
    return _shipped(io.BytesIO(encoded))


WAYS: tuple[Callable[[bytes], Tensor], ...] = (
    pillow,
    pillow_box,
    pillow_draft_box,
    torchvision_tensor,
    pillow_draft_tensor,
)


def write_photographs(folder: Path, size: tuple[int, int]) -> list[Path]:
    """The colour photographs as JPEG files of `size` (width, height); noise gives them a camera's entropy."""
    paths = []
    for number, photograph in enumerate(demo_photographs()):
        with Image.open(photograph) as image:
            if image.mode != "RGB":
                continue
            pixels = numpy.asarray(image.resize(size, Image.Resampling.BICUBIC), numpy.float32)
        noise = numpy.random.default_rng(number).normal(0, 3, pixels.shape)
        noisy = Image.fromarray((pixels + noise).clip(0, 255).astype(numpy.uint8))
        paths.append(folder / f"{size[0]}x{size[1]}-{number}.jpg")
        noisy.save(paths[-1], quality=90)
    return paths


def measure(paths: list[Path], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Per way: median images/s over the rounds and its pixels' mean absolute difference to `pillow`'s."""
    files = [path.read_bytes() for path in paths]

    def crops(way: Callable[[bytes], Tensor], count: int) -> list[Tensor]:
        torch.manual_seed(0)  # the same crops for every way
        return [way(files[index % len(files)]) for index in range(count)]

    expected = crops(pillow, len(files))
    differences = {}
    for way in WAYS:
        pairs = zip(crops(way, len(files)), expected, strict=True)
        differences[way.__name__] = statistics.mean((a.float() - b).abs().mean().item() for a, b in pairs)
    start = time.perf_counter()
    crops(pillow, len(files))
    count = max(len(files), round(len(files) * seconds / (time.perf_counter() - start)))
    rates: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            start = time.perf_counter()
            crops(way, count)
            rates[way.__name__].append(count / (time.perf_counter() - start))
    return {
        name: {"images_per_second": statistics.median(values), "difference": differences[name]}
        for name, values in rates.items()
    }


def main(rounds: int = 7, seconds: float = 0.5, json_file: Path | None = None) -> None:
    """Prints a table for each size.

    Args:
        rounds: how often each way is timed.
        seconds: about how long the slowest way takes in each round.
        json_file: where to write the figures too.
    """
    torch.set_num_threads(1)
    figures = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            results = measure(write_photographs(Path(folder), size), rounds, seconds)
        figures[f"{size[0]}x{size[1]}"] = results
        table = Table(title=f"JPEG {size[0]}x{size[1]} -> {SIDE}x{SIDE}, one thread, {rounds} rounds")
        for heading in ("way", "images/s", "ratio", "mean |difference| of 255"):
            table.add_column(heading, justify="left" if heading == "way" else "right")
        slowest = results["pillow"]["images_per_second"]
        for name, result in results.items():
            rate = result["images_per_second"]
            table.add_row(name, f"{rate:.0f}", f"{rate / slowest:.2f}x", f"{result['difference']:.2f}")
        Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
