"""Sample photographs for a first run without any data: those that ship inside scikit-image and scikit-learn.

The files are read from the installed packages; nothing is downloaded, and neither package is imported.
"""

import importlib.util
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader

from convmae.errors import UserError

# People, animals, things, places and textures, some through a microscope or a telescope; colour and grey.
_PHOTOGRAPHS = {
    "skimage": (
        "data/astronaut.png",
        "data/brick.png",
        "data/camera.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/coins.png",
        "data/grass.png",
        "data/gravel.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/motorcycle_left.png",
        "data/motorcycle_right.png",
        "data/retina.jpg",
        "data/rocket.jpg",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
# 16 photographs, each cropped 16 times: an epoch of 256 samples, eight batches of 32.
_CROPS_PER_PHOTOGRAPH = 16


def demo_photographs() -> list[Path]:
    """The paths of the 16 sample photographs; raises UserError where a package that holds them is missing."""
    paths = []
    for package, names in _PHOTOGRAPHS.items():
        specification = importlib.util.find_spec(package)  # finds the package's folder without importing it
        if specification is None or specification.origin is None:
            raise UserError("the demo photographs come with scikit-image and scikit-learn: pip install 'convmae[demo]'")
        paths += [Path(specification.origin).parent / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"the installed packages lack the demo photograph {missing[0]}: pip install -U 'convmae[demo]'")
    return paths


class DemoReader(Reader):
    """The photographs as a timm reader of 256 samples: reader[index] -> (binary file, label 0)."""

    def __init__(self) -> None:
        super().__init__()
        self._paths = demo_photographs()

    def __len__(self) -> int:
        return len(self._paths) * _CROPS_PER_PHOTOGRAPH

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self._path(index).open("rb"), 0

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return str(self._path(index)) if absolute else self._path(index).name

    def _path(self, index: int) -> Path:
        return self._paths[index // _CROPS_PER_PHOTOGRAPH]
