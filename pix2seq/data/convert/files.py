"""What YOLO and Pascal VOC datasets have in common: files, and the images they describe."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pix2seq.data.images import FORMATS_OF_SUFFIX
from pix2seq.errors import UserError

SUFFIXES = set(FORMATS_OF_SUFFIX)
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class SourceImage:
    """size is (width, height); objects are (class, xywh in pixels), with classes as they are called in the dataset."""

    path: Path
    size: tuple[int, int]
    objects: list[tuple[int | str, tuple[float, float, float, float]]]


# From a class as it is called in the dataset, a number or a name, to COCO's id and name.
Classes = dict[int | str, tuple[int, str]]


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from its header."""
    try:
        with Image.open(path) as image:
            turned = image.format in ("JPEG", "MPO") and image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: Path) -> str:
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))
