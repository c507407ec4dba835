"""The inputs of predict.py: files, folders, glob patterns and webcams."""

import glob
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from pix2seq.data.image_files import FORMATS_OF_SUFFIX
from pix2seq.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def is_webcam(path: str) -> bool:
    """Whether an input is the number of a webcam."""
    return path.isdecimal() and not os.path.exists(path)


def is_video(path: str) -> bool:
    """Whether an input is a video file, by its suffix, or a webcam."""
    return is_webcam(path) or Path(path).suffix.lower() in VIDEO_SUFFIXES


def find_inputs(inputs: Sequence[str], output_dir: Path) -> tuple[list[str], list[str]]:
    """Finds the images and videos that inputs stand for.

    Args:
        inputs: Files, folders, glob patterns and numbers of webcams. Folders are searched recursively for images.
        output_dir: Folder that is not searched.

    Returns:
        The images and videos in order, each once, and the files of the folders that are not images by their suffix.

    Raises:
        UserError: An input stands for no file.
    """
    unique: dict[str, str] = {}
    skipped: dict[str, str] = {}
    if not inputs or "" in inputs:
        raise UserError("no inputs: name images, folders, glob patterns, videos or a webcam, before any flag")
    for item in inputs:
        paths = [item] if os.path.exists(item) or is_webcam(item) else sorted(glob.glob(item, recursive=True))
        if not paths:
            raise UserError(f"{item}: {'matches no file' if glob.has_magic(item) else 'no such file or folder'}")
        files = []
        for path in paths:
            images, others = _search_folder(Path(path), output_dir) if os.path.isdir(path) else ([path], [])
            files += images
            skipped |= {_identity(file): file for file in others}
        if not files:
            raise UserError(f"{item}: contains no images ({' '.join(FORMATS_OF_SUFFIX)})")
        for file in files:
            unique.setdefault(_identity(file), file)
    return list(unique.values()), [file for identity, file in skipped.items() if identity not in unique]


def _identity(file: str) -> str:
    """The path of a file with the links of its folder resolved. Links to one file are different files."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name)


def _search_folder(folder: Path, output_dir: Path) -> tuple[list[str], list[str]]:
    """The images of a folder, by their suffix, and its other files; without those of `output_dir`."""
    images: list[str] = []
    others: list[str] = []
    output_dir = output_dir.resolve()
    contains_output = folder.resolve() in output_dir.parents
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or (contains_output and output_dir in path.resolve().parents):
            continue
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        is_image = path.suffix.lower() in FORMATS_OF_SUFFIX and not is_hidden
        (images if is_image else others).append(str(path))
    return images, others


def unique_names(paths: Sequence[str]) -> dict[str, str]:
    """The name of the output files of each input: its own without suffix, with a number where names collide."""
    names: dict[str, str] = {}
    used: set[str] = set()
    counters: dict[str, itertools.count] = {}
    for path in paths:
        stem = f"webcam_{path}" if is_webcam(path) else Path(path).stem
        # Names are compared without case, because some file systems do not distinguish it.
        counter = counters.setdefault(stem.casefold(), itertools.count(1))
        candidates = (stem if number == 1 else f"{stem}_{number}" for number in counter)
        names[path] = next(name for name in candidates if name.casefold() not in used)
        used.add(names[path].casefold())
    return names
