"""What predict.py is asked about: files, folders, globs, and the numbers of webcams, as words of a command line."""

import glob
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from pix2seq.data.image_files import FORMATS_OF_SUFFIX
from pix2seq.errors import UserError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def is_camera(word: str) -> bool:
    return word.isdecimal() and not os.path.exists(word)


def is_video(word: str) -> bool:
    """By its name, or a webcam."""
    return is_camera(word) or Path(word).suffix.lower() in VIDEO_SUFFIXES


def find_inputs(words: Sequence[str], output: Path) -> tuple[list[str], list[str]]:
    """What the words name, each once and in their order: files, pictures in folders and below them, what globs match,
    and numbers of webcams. And what else is in these folders, but for the `output`'s. Raises UserError."""
    found, left_out = {}, {}
    if not words or "" in words:
        raise UserError("no pictures: name files, folders, globs, videos or the number of a webcam, before any flag")
    for word in words:
        paths = [word] if os.path.exists(word) or is_camera(word) else sorted(glob.glob(word, recursive=True))
        if not paths:
            raise UserError(f"{word}: {'matches nothing' if glob.has_magic(word) else 'no such file or folder'}")
        files = []
        for path in paths:
            pictures, others = _in_folder(Path(path), output) if os.path.isdir(path) else ([path], [])
            files += pictures
            left_out |= {os.path.realpath(file): file for file in others}
        if not files:
            raise UserError(f"{word}: holds no pictures, which are {' '.join(FORMATS_OF_SUFFIX)}")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), [file for place, file in left_out.items() if place not in found]


def _in_folder(folder: Path, output: Path) -> tuple[list[str], list[str]]:
    """Pictures by their names, and other files."""
    pictures, others, output = [], [], output.resolve()
    has_output = folder.resolve() in output.parents
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or (has_output and output in path.resolve().parents):
            continue
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        is_image_name = path.suffix.lower() in FORMATS_OF_SUFFIX and not hidden
        (pictures if is_image_name else others).append(str(path))
    return pictures, others


def name_inputs(paths: Sequence[str]) -> dict[str, str]:
    """What is written for each is called as it is, without suffix; numbered where that is taken."""
    names, taken, numbers = {}, set(), {}
    for path in paths:
        stem = f"webcam_{path}" if is_camera(path) else Path(path).stem
        # Some file systems do not tell large letters from small ones.
        counter = numbers.setdefault(stem.casefold(), itertools.count(1))
        choices = (stem if number == 1 else f"{stem}_{number}" for number in counter)
        names[path] = next(choice for choice in choices if choice.casefold() not in taken)
        taken.add(names[path].casefold())
    return names
