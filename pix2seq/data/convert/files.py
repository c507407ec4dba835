"""What YOLO and Pascal VOC datasets have in common: files, and the images they describe."""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pix2seq.data.image_files import EXIF_ORIENTATION, FORMATS, FORMATS_OF_SUFFIX
from pix2seq.errors import UserError


@dataclass(frozen=True)
class SourceImage:
    """size is (width, height); objects are (class, xywh in pixels), with classes as they are called in the dataset."""

    path: Path
    size: tuple[int, int]
    objects: list[tuple[int | str, tuple[float, float, float, float]]]


# From a class as it is called in the dataset, a number or a name, to COCO's id and name.
Classes = dict[int | str, tuple[int, str]]


@dataclass
class Source:
    """The folder of a dataset, which opens what is in it.

    follow_links   also open what lies elsewhere: behind symbolic links, or where the dataset's lists lead
    tell           is given a line about whatever is left out
    """

    folder: Path
    follow_links: bool = False
    tell: Callable[[str], None] = lambda line: None
    _inside: dict[Path, bool] = field(default_factory=dict)

    def own(self, path: Path) -> Path:
        """The path, before it is opened. Raises UserError if it lies elsewhere."""
        if not (self.follow_links or self.holds(path)):
            raise UserError(f"{path}: lies outside {self.folder}, and is not opened (--follow_links allows it)")
        return path

    def holds(self, path: Path) -> bool:
        if path == self.folder:
            return True
        if path.parent not in self._inside:
            self._inside[path.parent] = self._is_inside(path.parent)
        return self._inside[path.parent] and (not path.is_symlink() or self._is_inside(path))

    def _is_inside(self, path: Path) -> bool:
        base = os.path.realpath(self.folder)
        return os.path.commonpath([base, os.path.realpath(path)]) == base

    def lines(self, path: Path) -> Iterator[tuple[int, str]]:
        return read_lines(self.own(path))

    def size(self, path: Path) -> tuple[int, int]:
        return oriented_size(self.own(path))

    def pictures(self, folder: Path) -> Iterator[Path]:
        """Those in a folder, at any depth."""
        seen = set()  # links may lead back to where they are
        for place, folders, names in os.walk(self.own(folder), followlinks=True):
            seen.add(os.path.realpath(place))
            folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(place, f)) not in seen)
            for name in folders:
                self.own(Path(place, name))
            yield from (Path(place, name) for name in sorted(names) if is_image_name(name))

    def left_out(self, what: str, paths: Collection[Path]) -> None:
        if paths:
            self.tell(f"{len(paths)} {what}, the first of them {min(paths)}")


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in FORMATS_OF_SUFFIX and not name.startswith(".")


def oriented_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from its header."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.format in ("JPEG", "MPO") and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
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
