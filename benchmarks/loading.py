"""How fast one core turns JPEG files into batches of random 224x224 crops, and several ways to decode and crop them.

python benchmarks/loading.py [--rounds 15] [--json_file loading.json]

The files are the demo photographs (pip install 'convmae[demo]') at the stated size with a little noise. First whole
loaders, from files of ImageNet's average size on disk to uint8 batches: torchvision's ImageFolder with Pillow and its
usual transforms, and ours. Then single ways, from bytes to a crop: all do the whole job (decode, crop, bicubic and
antialiased, flip, uint8 tensor), with the same random numbers but for ours, which draws others from the same
distribution. All take turns within each round; the tables give the medians over the rounds.
"""

import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import simplejpeg
import torch
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from convmae.data.demo import demo_photographs
from convmae.data.images import RandomCrop
from convmae.data.loading import Loading, build_training_loader
from convmae.data.sources import open_images

SIZES = ((500, 375), (2000, 1500), (4000, 3000))  # ImageNet's average, the web's, a phone's
SIDE = 224
BATCH = 64
REPEATS = (1, 2, 4)
BASELINE = "torchvision"

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
    pixels = decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)
    return _flip(_crop(pixels))


def pillow_draft_tensor(encoded: bytes) -> Tensor:
    """Pillow decodes a large JPEG at a reduced size; the crop is resampled as a tensor."""
    image = Image.open(io.BytesIO(encoded))
    crop = _crop.make_params([image])
    width, height = image.size
    image.draft("RGB", (math.ceil(2 * SIDE * width / crop["width"]), math.ceil(2 * SIDE * height / crop["height"])))
    scale = image.width / width
    left, top = round(crop["left"] * scale), round(crop["top"] * scale)
    right, bottom = round((crop["left"] + crop["width"]) * scale), round((crop["top"] + crop["height"]) * scale)
    pixels = functional.pil_to_tensor(image.crop((left, top, right, bottom)))
    return _flip(functional.resize(pixels, [SIDE, SIDE], InterpolationMode.BICUBIC))


def simplejpeg_tensor(encoded: bytes) -> Tensor:
    """simplejpeg decodes all pixels to an array; the crop is resampled as a tensor."""
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(encoded, "RGB"))
    return _flip(_crop(pixels.permute(2, 0, 1)))


def ours(encoded: bytes) -> Tensor:
    """What convmae does: simplejpeg, a large JPEG at a reduced size; the crop is resampled channels-last."""
    return _shipped(io.BytesIO(encoded), None, [int(torch.randint(2**62, ()))])[0]["image"]


WAYS: tuple[Callable[[bytes], Tensor], ...] = (
    pillow,
    pillow_box,
    pillow_draft_box,
    torchvision_tensor,
    pillow_draft_tensor,
    simplejpeg_tensor,
    ours,
)


def write_photographs(folder: Path, size: tuple[int, int], prefix: str = "") -> list[Path]:
    """The colour photographs as JPEG files of `size` (width, height); noise gives them a camera's entropy."""
    paths = []
    for number, photograph in enumerate(demo_photographs()):
        with Image.open(photograph) as image:
            if image.mode != "RGB":
                continue
            pixels = numpy.asarray(image.resize(size, Image.Resampling.BICUBIC), numpy.float32)
        noise = numpy.random.default_rng(number).normal(0, 3, pixels.shape)
        noisy = Image.fromarray((pixels + noise).clip(0, 255).astype(numpy.uint8))
        paths.append(folder / f"{prefix}{size[0]}x{size[1]}-{number}.jpg")
        noisy.save(paths[-1], quality=90)
    return paths


def measure_loaders(rounds: int, workers: int) -> dict[str, dict[str, float]]:
    """Per loader: median images/s a core over the rounds, and the ratio to ImageFolder's with its range."""
    varied = transforms.Compose(
        [
            transforms.RandomResizedCrop((SIDE, SIDE), (0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )

    def epochs(loader: DataLoader) -> Iterator[int]:
        """Yields the number of images of each batch, without end."""
        epoch = 0
        while True:
            if hasattr(loader, "set_position"):
                loader.set_position(epoch)
            for batch in loader:
                yield len(batch["images"] if isinstance(batch, dict) else batch[0])
            epoch += 1

    # Loading processes work ahead, so with them a turn is a whole epoch by the clock; without, the processor's time,
    # which other work on the machine disturbs less.
    clock = time.perf_counter if workers else time.process_time
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "class").mkdir()
        for copy in range(4 * BATCH // 11 + 1):  # each file is another place on the disk
            write_photographs(Path(name) / "class", SIZES[0], f"{copy}-")
        loaders: dict[str, DataLoader] = {
            BASELINE: DataLoader(
                ImageFolder(name, varied),
                BATCH,
                shuffle=True,
                num_workers=workers,
                drop_last=True,
                persistent_workers=workers > 0,
            )
        }
        for repeats in REPEATS:
            loaders[f"ours, aug_repeats {repeats}"] = build_training_loader(
                open_images(name), _shipped, Loading(BATCH, num_workers=workers), aug_repeats=repeats
            )
        batches = {way: epochs(loader) for way, loader in loaders.items()}
        rates: dict[str, list[float]] = {way: [] for way in loaders}
        for number in range(rounds + 1):
            for way, loader in loaders.items():
                start = clock()
                images = sum(next(batches[way]) for _ in range(len(loader) if workers else 2))
                if number:  # the first round warms up
                    rates[way].append(images / (clock() - start))
    results = {}
    for way, values in rates.items():
        ratios = [value / baseline for value, baseline in zip(values, rates[BASELINE], strict=True)]
        results[way] = {
            "images_per_second": statistics.median(values),
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
        }
    return results


def measure_ways(paths: list[Path], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Per way: median images/s over the rounds and its pixels' mean absolute difference to `pillow`'s."""
    files = [path.read_bytes() for path in paths]

    def crops(way: Callable[[bytes], Tensor], count: int) -> list[Tensor]:
        torch.manual_seed(0)  # the same crops for every way
        return [way(files[index % len(files)]) for index in range(count)]

    start = time.process_time()
    expected = crops(pillow, len(files))
    count = max(len(files), round(len(files) * seconds / (time.process_time() - start)))
    differences = {}
    for way in WAYS:
        pairs = zip(crops(way, len(files)), expected, strict=True)
        differences[way.__name__] = statistics.mean((a.float() - b).abs().mean().item() for a, b in pairs)
    differences[ours.__name__] = _difference_of_ours(files)
    rates: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            start = time.process_time()
            crops(way, count)
            rates[way.__name__].append(count / (time.process_time() - start))
    return {
        name: {
            "images_per_second": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, rates["pillow"], strict=True)),
            "difference": differences[name],
        }
        for name, values in rates.items()
    }


def _difference_of_ours(files: list[bytes]) -> float:
    """The mean absolute difference of our crops to Pillow's pixels of the same crops."""
    differences = []
    for seed, encoded in enumerate(files):
        image = Image.open(io.BytesIO(encoded))
        top, left, height, width, mirrored = _shipped.draw(image.height, image.width, seed)
        expected = functional.pil_to_tensor(
            image.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        )
        result = _shipped(io.BytesIO(encoded), None, [seed])[0]["image"]
        differences.append((result.float() - (expected.flip(2) if mirrored else expected)).abs().mean().item())
    return statistics.mean(differences)


def _print_table(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main(rounds: int = 15, seconds: float = 0.2, workers: int = 0, json_file: Path | None = None) -> None:
    """Prints a table of the loaders and one of the ways for each size.

    Args:
        rounds: how often each loader and each way is timed.
        seconds: about how long the slowest way takes in each round.
        workers: processes that load, of each loader; 0 for none.
        json_file: where to write the figures too.
    """
    torch.set_num_threads(1)
    loaders = measure_loaders(rounds, workers)
    figures: dict[str, Any] = {"loaders": loaders}
    _print_table(
        f"JPEG files {SIZES[0][0]}x{SIZES[0][1]} -> batches of {BATCH}, {workers} workers, {rounds} rounds",
        ("loader", "images/s a core", "ratio (range)"),
        [
            (
                name,
                f"{result['images_per_second']:.0f}",
                f"{result['ratio']:.2f}x ({result['lowest_ratio']:.2f}-{result['highest_ratio']:.2f})",
            )
            for name, result in loaders.items()
        ],
    )
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            results = measure_ways(write_photographs(Path(folder), size), rounds, seconds)
        figures[f"{size[0]}x{size[1]}"] = results
        _print_table(
            f"JPEG {size[0]}x{size[1]} -> {SIDE}x{SIDE}, one thread, {rounds} rounds",
            ("way", "images/s", "ratio", "mean |difference| of 255"),
            [
                (
                    name,
                    f"{result['images_per_second']:.0f}",
                    f"{result['ratio']:.2f}x",
                    f"{result['difference']:.2f}",
                )
                for name, result in results.items()
            ],
        )
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
