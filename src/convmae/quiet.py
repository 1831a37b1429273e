"""Keeps what libraries say of images and data sets off the terminal: what matters of it, this package says itself."""

import logging
import warnings

_LOGGERS = ("PIL", "timm.data", "timm.scheduler", "webdataset", "datasets", "fsspec")


def quiet_libraries(worker: int = 0) -> None:
    """Silence what Pillow (EXIF, TIFF tags, palettes, large images) and readers of data sets say, in this process.

    worker: number of a loading process, which torch tells and which is not needed.
    """
    warnings.filterwarnings("ignore", module=r"PIL(\..*)?$")
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many processes as were asked for
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
