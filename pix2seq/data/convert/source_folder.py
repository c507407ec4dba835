"""Files of the dataset to convert. Only files inside its folder are opened."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pix2seq.data.image_files import EXIF_ORIENTATION, FORMATS, FORMATS_OF_SUFFIX
from pix2seq.errors import UserError

# The number or name of a class in the source dataset -> (category id, name) in the COCO file.
Classes = dict[int | str, tuple[int, str]]


@dataclass(frozen=True)
class SourceImage:
    """An image of the source dataset.

    Args:
        path: Its file.
        size: (width, height) in pixels.
        objects: (class, (x, y, width, height) in pixels) of each object; the class is a key of `Classes`.
    """

    path: Path
    size: tuple[int, int]
    objects: Sequence[tuple[int | str, tuple[float, float, float, float]]]


@dataclass
class SourceFolder:
    """The folder of the source dataset.

    Args:
        path: The folder.
        follow_links: Whether to open files outside the folder, behind symbolic links or in lists of images.
        notify: Called with a message about each kind of file that is omitted.
    """

    path: Path
    follow_links: bool
    notify: Callable[[str], None]

    def contains(self, path: Path) -> bool:
        """Returns whether a path, with its links resolved, lies inside the folder."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.path))

    def allow(self, path: Path) -> Path:
        """Returns the path. Raises UserError if it lies outside the folder. Call it before any file is opened."""
        if not (self.follow_links or self.contains(path)):
            raise UserError(f"{path}: lies outside {self.path} and is not opened (--follow_links allows it)")
        return path

    def read_bytes(self, path: Path) -> bytes:
        """Reads a file."""
        try:
            return self.allow(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def read_text(self, path: Path) -> str:
        """Reads a UTF-8 file."""
        content = self.read_bytes(path)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}:{line}: is not UTF-8 text") from None

    def read_lines(self, path: Path) -> Iterator[tuple[int, str]]:
        """Yields (line number, text) of the lines that are not empty."""
        for number, line in enumerate(self.read_text(path).split("\n"), start=1):
            if line.strip():
                yield number, line.strip()

    def image_size(self, path: Path) -> tuple[int, int]:
        """Reads (width, height) of an image from its header, with the EXIF orientation applied."""
        self.allow(path)
        try:
            with Image.open(path, formats=FORMATS) as image:
                is_jpeg = image.format in ("JPEG", "MPO")
                transposed = is_jpeg and image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
                return image.size[::-1] if transposed else image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: cannot be read as an image ({error})") from None

    def list_images(self, folder: Path) -> Iterator[Path]:
        """Yields the images in a folder, at any depth."""
        visited = set()  # links may form cycles
        for parent, folders, names in os.walk(self.allow(folder), followlinks=True):
            visited.add(os.path.realpath(parent))
            folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(parent, f)) not in visited)
            for name in folders:
                self.allow(Path(parent, name))
            yield from (Path(parent, name) for name in sorted(names) if is_image_name(name))

    def note_omitted(self, description: str, paths: Collection[Path]) -> None:
        """Reports files that are omitted, if there are any."""
        if paths:
            self.notify(f"{len(paths)} {description}, the first is {min(paths)}")


def is_image_name(name: str) -> bool:
    """Returns whether a file name has the suffix of an image and is not hidden."""
    return os.path.splitext(name)[1].lower() in FORMATS_OF_SUFFIX and not name.startswith(".")


def absolute(path: str | Path) -> Path:
    """Makes a path absolute and removes `..` without resolving links."""
    return Path(os.path.abspath(path))
