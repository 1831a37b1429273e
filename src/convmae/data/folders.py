"""Which files of a folder are images; what tools and runs leave there is told apart, and all else is counted."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import features

from convmae.findings import Finding

_LISTED = 1000  # of a finding; there may be millions


def _readable_extensions() -> tuple[str, ...]:
    """Extensions of the files that this Pillow decodes for sure, and of NumPy's arrays."""
    known = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy"]
    known += [".jfif", ".jpe", ".ppm", ".pgm", ".pbm", ".pnm"]
    if "avif" in features.modules and features.check_module("avif"):
        known.append(".avif")
    if features.check_codec("jpg_2000"):
        known += [".jp2", ".j2k"]
    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
        known += [".heic", ".heif"]
    return tuple(known)


EXTENSIONS = _readable_extensions()
"""Of images, in lower case."""

# What operating systems, file servers and archivers leave behind, besides names that begin with a dot; lower case.
_LEFT_BEHIND = {
    "@eadir",
    "@recycle",
    "#recycle",
    "$recycle.bin",
    "__macosx",
    "lost+found",
    "system volume information",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
}

# What a run writes into its folder that may look like data.
_RUN_FOLDERS = {"reconstructions", "checkpoints", "best", "tensorboard"}
_RUN_FILES = {
    *("loss.png", "confusion.png", "detections.png", "segmentation.png", "per-class.csv"),
    *("config.yaml", "metrics.jsonl", "data-report.txt", "undecodable-images.txt", "validation-images.txt"),
}

# Why images are left out, in the words of a finding.
_HIDDEN = "in hidden files and folders, as systems and tools leave them,"
_OF_RUNS = "drawn by training runs in this folder"
_OUTSIDE = "outside the class folders"


class FolderImages(NamedTuple):
    """The image files of a folder."""

    paths: list[str]
    """Inside the folder, in natural order: 2.png before 10.png."""
    findings: list[Finding]
    """What else there is, counted."""
    others: str
    """Number and extensions of the other files, such as "3 other files: .txt 2, .avi 1"; empty where there is none."""


def is_image_name(name: str, extensions: Sequence[str] = EXTENSIONS) -> bool:
    """Whether a file of this name is an image by its extension, whatever its case."""
    return name[name.rfind(".") :].lower() in extensions


def is_left_behind(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or what systems and tools leave: neither image nor class."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _LEFT_BEHIND


def is_run(files: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether a folder with these files and folders holds a training run of ours."""
    return "config.yaml" in files and ("metrics.jsonl" in files or "checkpoints" in folders)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without those that tools left and those of runs."""

    def holds_run(path: Path) -> bool:
        names = [entry.name for entry in path.iterdir()] if (path / "config.yaml").is_file() else []
        return is_run(names, names)

    of_run = _RUN_FOLDERS if holds_run(folder) else set()
    paths = [path for path in folder.iterdir() if path.is_dir() and not is_left_behind(path.name)]
    return sorted(path.name for path in paths if path.name not in of_run and not holds_run(path))


def image_files(folder: str | Path, extensions: Sequence[str] = EXTENSIONS, in_classes: bool = False) -> FolderImages:
    """Find the image files of a folder at any depth, through links to folders, too.

    extensions: of images, in lower case. Left out and counted in the findings: hidden files and folders and those that
    systems and tools leave; folders that hold a run of ours; links that lead back to a folder above them; with
    in_classes, images that are in none of its folders. Where the folder itself holds a run, its own pictures are left
    out.
    """
    root = os.fspath(folder)
    left_out: dict[str, list[str]] = {_HIDDEN: [], _OF_RUNS: [], _OUTSIDE: []}
    reasons: dict[str, str | None] = {}  # of folders, why nothing in them is read
    circles: list[str] = []
    found: list[str] = []
    others: list[str] = []
    for parent, folders, files in os.walk(root, followlinks=True):
        inside = os.path.relpath(parent, root) if parent != root else ""
        reason = reasons.pop(parent, None)
        run_itself = False
        if is_run(files, folders):
            run_itself = parent == root
            reason = reason or (None if run_itself else _OF_RUNS)
        open_folders = []
        for name in folders:
            path = os.path.join(parent, name)  # noqa: PTH118
            if _leads_back(parent, path):
                circles.append(os.path.join(inside, name))  # noqa: PTH118
                continue
            open_folders.append(name)
            why = _HIDDEN if is_left_behind(name) else _OF_RUNS if run_itself and name in _RUN_FOLDERS else None
            reasons[path] = reason or why
        folders[:] = open_folders
        for name in files:
            path = os.path.join(inside, name)  # noqa: PTH118
            why = reason or (_HIDDEN if is_left_behind(name) else None)
            why = why or (_OF_RUNS if run_itself and name in _RUN_FILES else None)
            if is_image_name(name, extensions):
                why = why or (_OUTSIDE if in_classes and not inside else None)
                (found if why is None else left_out[why]).append(path)
            elif why is None:
                others.append(path)
    found.sort(key=lambda path: (_natural(path), path))
    told = _by_extension(others)
    findings = []
    if others and found:
        findings.append(listed(f"{counted(len(found), 'image')} ({told.replace(':', ' ignored:', 1)})", others))
    findings += [left_out_finding("image", which, paths) for which, paths in left_out.items() if paths]
    if circles:
        are = "is" if len(circles) == 1 else "are"
        findings.append(listed(f"{counted(len(circles), 'link')} to a folder above {are} not followed", circles))
    return FolderImages(found, findings, told)


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural where it is not 1: "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(summary: str, items: Sequence[str]) -> Finding:
    """A finding with so many of its items as anybody reads."""
    more = [f"and {len(items) - _LISTED} more"] if len(items) > _LISTED else []
    return Finding(summary, [*sorted(items)[:_LISTED], *more])


def left_out_finding(noun: str, which: str, names: Sequence[str]) -> Finding:
    """A finding that these are left out, with the first of them as an example."""
    are = "is" if len(names) == 1 else "are"
    return listed(f"{counted(len(names), noun)} {which} {are} left out, such as {min(names)}", names)


def _by_extension(names: Sequence[str]) -> str:
    if not names:
        return ""
    extensions = Counter(os.path.splitext(name)[1].lower() or "without extension" for name in names)  # noqa: PTH122
    shown = [f"{extension} {count}" for extension, count in sorted(extensions.items(), key=lambda kv: (-kv[1], kv[0]))]
    more = ["..."] if len(shown) > 8 else []
    return f"{counted(len(names), 'other file')}: {', '.join(shown[:8] + more)}"


def _natural(path: str) -> list[str | int]:
    """Key of an order in which numbers count as numbers and case does not."""
    parts = re.split(r"(\d+)", path.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _leads_back(parent: str, path: str) -> bool:
    """Whether a folder is a link to one that it lies in, which would be walked through for ever."""
    if not os.path.islink(path):  # noqa: PTH114
        return False
    target, place = os.path.realpath(path), os.path.realpath(parent)
    return place == target or place.startswith(target.rstrip(os.sep) + os.sep)
