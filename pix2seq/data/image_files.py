"""Picture files: where they lie, what their headers say, and their pixels.

A store (`Folder`, `Zip`, `Shards`) finds pictures by the names an annotation file gives them and reads their bytes. It
opens nothing that lies outside it. `Picture` is what is in those bytes.
"""

import io
import json
import os
import re
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from pix2seq.errors import UserError
from pix2seq.transforms import from_pil

# Kinds of files that are opened. Pillow knows more, some of which start other programs.
Image.init()
FORMATS = [f for f in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000") if f in Image.OPEN]
# Decoding takes 3 bytes a pixel, and a file of some kilobytes may claim any number of them.
MAX_PIXELS = 100_000_000
MAX_BYTES = 8 * MAX_PIXELS  # of a file: four channels of 16 bits, as they are
EXIF_ORIENTATION = 0x0112
# What a file is called, and which of these formats it then should be.
FORMATS_OF_SUFFIX = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("JPEG", "MPO")),
    **{".png": ("PNG",), ".webp": ("WEBP",), ".bmp": ("BMP",), ".tif": ("TIFF",), ".tiff": ("TIFF",)},
    **{".gif": ("GIF",), ".ppm": ("PPM",), ".pgm": ("PPM",), ".avif": ("AVIF",), ".jp2": ("JPEG2000",)},
}
SHARDS_INDEX = "shards.json"


class BadImageError(ValueError):
    """A picture that cannot be used. `kind`: see faults.KINDS. The message says why, in one line, and not which: it
    names no folder of the machine, for reports are sent to others."""

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        # torchvision begins with a place in the C++ it was built from.
        self.kind, self.reason = kind, " ".join(re.sub(r"\S+\.cpp:\d+, ", "", str(reason)).split())

    def __str__(self) -> str:
        return self.reason


class ImageFile:
    """A picture of which only the header has been read. Raises BadImageError.

    annotated   (height, width) as the annotations say, if they do. A picture whose EXIF tag swaps its sides is turned
                if, and only if, these are the swapped ones: annotation tools differ in what they do with the tag.
    upright     where there are no annotations: turned and mirrored as the tag says
    shape       (3, height, width) of its pixels
    """

    def __init__(self, data: np.ndarray, annotated: tuple[int, int] | None = None, upright: bool = False):
        if len(data) == 0:
            raise BadImageError("unreadable-file", "it is empty (0 bytes)")
        self._data = data
        self.header = self._open()
        width, height = self.header.size
        if width * height > MAX_PIXELS:
            raise _too_many(f"{width} x {height}")
        swapped = self.orientation >= 5
        self.turned = self.orientation > 1 if upright else annotated == (width, height) != (height, width) and swapped
        self.shape = (3, width, height) if self.turned and swapped else (3, height, width)

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._data), formats=FORMATS)
        except Image.DecompressionBombError as error:  # before it has a size
            raise _too_many(re.search(r"\d+", str(error))[0]) from None
        except Image.UnidentifiedImageError:
            raise BadImageError("unreadable-file", f"not an image, or none of {', '.join(FORMATS)}") from None
        except Exception as error:  # of damaged headers, each decoder makes an error of its own
            raise BadImageError("unreadable-file", error) from None

    @property
    def orientation(self) -> int:
        """EXIF's: 1 is as stored, 5 to 8 swap the sides."""
        try:
            orientation = int(self.header.getexif().get(EXIF_ORIENTATION, 1))
        except Exception:  # a damaged tag is none
            return 1
        return orientation if 1 <= orientation <= 8 else 1

    def pixels(self, at_least: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 RGB (3, H, W): the whole size, or a half, quarter or eighth of it if that is no smaller than
        (height, width) `at_least` and the file is a JPEG, which can be decoded at these for less."""
        image = self.header
        try:
            if image.format == "JPEG" and image.mode in ("RGB", "L") and not self.turned:
                reduced = at_least is not None and all(
                    2 * wanted <= length for wanted, length in zip(at_least, self.shape[1:], strict=True)
                )
                if not reduced:
                    return decode_jpeg(torch.from_numpy(self._data), mode=ImageReadMode.RGB)
                image = self._open()  # a picture may be decoded more than once, at other sizes
                image.draft("RGB", (at_least[1], at_least[0]))
            return from_pil(ImageOps.exif_transpose(image) if self.turned else image)
        except Exception as error:  # of damaged files, each decoder makes an error of its own
            raise BadImageError("unreadable-file", error) from None


def open_file(path: str | Path) -> ImageFile:
    """A picture that nobody has annotated, upright as viewers show it. Raises BadImageError."""
    check_regular(path)
    return ImageFile(Folder(Path(path).parent).read(Path(path).name), upright=True)


def check_regular(path: str | Path) -> None:
    """Raises BadImageError for a pipe, device, socket or folder: opening one may take for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImageError("unreadable-file", "not a regular file, and only these are opened")


def _too_many(pixels: str) -> BadImageError:
    return BadImageError("too-many-pixels", f"{pixels} pixels, more than the {MAX_PIXELS / 1e6:.0f} million allowed")


def check_size(size: int) -> None:
    """Of a file in bytes, before it is read. Raises BadImageError."""
    if size > MAX_BYTES:
        raise BadImageError("unreadable-file", f"{size} bytes, more than the {MAX_BYTES / 1e6:.0f} million allowed")


class Folder:
    """Pictures as files below a folder.

    follow_links   also open those that symbolic links bring in from elsewhere
    """

    def __init__(self, path: Path, follow_links: bool = False):
        self.path, self.follow_links = path, follow_links

    def locate(self, names: list[str]) -> tuple[np.ndarray, dict[int, BadImageError]]:
        """For each name the place to `read`, and of those that must not or cannot be read, by index, why. Names that
        are there in another form of Unicode are found, and told as "other-unicode-form"."""
        places, faults, listings = [], {}, {}
        for index, name in enumerate(names):
            folder, _, file = name.rpartition("/")
            parts = name.replace("\\", "/").split("/")
            if os.path.isabs(name) or name[1:3] in (":/", ":\\") or ".." in parts or "\0" in name:
                faults[index] = BadImageError("path-outside", "leads out of the folder of images")
                places.append("")
                continue
            if folder not in listings:
                listings[folder] = self._listing(folder)
            found, by_form, problem = listings[folder]
            if file not in found:
                other = by_form.get(unicodedata.normalize("NFC", file))
                kind, why = "missing-file", problem or "no such file in the folder of images"
                if other is not None:
                    kind, why = "other-unicode-form", "the letters with marks on them are coded otherwise on disk"
                faults[index], file = BadImageError(kind, why), other or ""
            if file and not found[file]:
                why = "a symbolic link out of the folder of images (--follow_links allows it)"
                faults[index], file = BadImageError("path-outside", why), ""
            places.append(f"{folder}/{file}".lstrip("/") if file else "")
        # Not a list: workers that look at Python objects copy them, and their memory grows.
        return np.array(places, dtype=np.dtypes.StringDType()), faults

    def _listing(self, folder: str) -> tuple[dict[str, bool], dict[str, str], str | None]:
        """The files in one folder, and whether they may be opened; those that are not ASCII by their composed form;
        and what is wrong with the folder. One listing answers for all of them."""
        base = os.path.realpath(self.path)

        def inside(path) -> bool:
            return self.follow_links or os.path.commonpath([base, os.path.realpath(path)]) == base

        found = {}
        try:
            allowed = inside(self.path / folder)
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            found[entry.name] = allowed and (not entry.is_symlink() or inside(entry.path))
                    except OSError:  # a link that leads to itself is no file
                        continue
        except FileNotFoundError:
            pass
        except OSError as error:
            return {}, {}, f"its folder cannot be read ({error.strerror})"
        by_form = {unicodedata.normalize("NFC", name): name for name in found if not name.isascii()}
        return found, by_form, None

    def read(self, place: str) -> np.ndarray:
        try:
            check_size(os.stat(self.path / place).st_size)
            return np.fromfile(self.path / place, dtype=np.uint8)
        except (OSError, MemoryError) as error:
            raise BadImageError("unreadable-file", getattr(error, "strerror", None) or error) from None


class _Packed:
    """Pictures inside a few large files. Rows say where: see the subclasses."""

    def __init__(self, path: Path, files: list[Path], names: list[str], rows: np.ndarray):
        self.path, self._files, self._names, self._rows = path, files, names, rows
        self._descriptors: dict[int, int] = {}

    def __getstate__(self):  # for workers that are not forked
        return self.__dict__ | {"_descriptors": {}, "_names": [], "_rows": None}

    def locate(self, names: list[str]) -> tuple[np.ndarray, dict[int, BadImageError]]:
        """As Folder's; places are rows of numbers."""
        # COCO's archives put all files into a folder of their own.
        tops = {name.partition("/")[0] for name in self._names}
        top = f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in self._names) else ""
        row_of = {name.removeprefix(top): row for row, name in enumerate(self._names)}
        row_of |= {name: row for row, name in enumerate(self._names)}
        rows = [row_of.get(name, -1) for name in names]
        missing = {
            i: BadImageError("missing-file", f"not in {self.path.name}") for i, row in enumerate(rows) if row < 0
        }
        places = np.append(self._rows, np.full((1, self._rows.shape[1]), -1), axis=0)[rows]
        return places, missing

    def _bytes(self, file: int, offset: int, size: int) -> np.ndarray:
        try:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self._files[file], os.O_RDONLY)
            data = np.empty(size, dtype=np.uint8)
            # Workers share the file's position if they are forked, so nobody moves it.
            count = os.preadv(self._descriptors[file], [data], offset)
        except (OSError, MemoryError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else error  # the whole names a folder of the machine
            raise BadImageError("unreadable-file", f"{self._files[file].name}: {why}") from None
        if count != size:
            raise BadImageError("unreadable-file", f"{self._files[file].name} ends before it does")
        return data

    def _whole(self, data: np.ndarray, size: int, checksum: int) -> np.ndarray:
        if len(data) != size or zlib.crc32(data) != checksum:
            raise BadImageError("unreadable-file", f"damaged: not what was put into {self.path.name}")
        return data


class Zip(_Packed):
    """Pictures in a zip archive that is left as it is. Rows: header's offset, bytes packed, bytes, method, CRC."""

    def __init__(self, path: Path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
            rows = [(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC) for m in members]
            rows = np.array(rows, dtype=np.int64).reshape(-1, 5)
        except Exception as error:  # of damaged archives, zipfile makes many kinds of errors
            raise UserError(f"{path}: cannot be read as a zip archive ({error})") from None
        super().__init__(path, [path], [member.filename for member in members], rows)

    def read(self, place: np.ndarray) -> np.ndarray:
        offset, packed, size, method, checksum = place.tolist()
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadImageError("unreadable-file", f"packed by method {method}, which cannot be unpacked")
        check_size(max(packed, size))
        name_length, extra_length = struct.unpack("<HH", self._bytes(0, offset + 26, 4))
        data = self._bytes(0, offset + 30 + name_length + extra_length, packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                # Not more than the header says, and one byte to see that there would be; 0 would be no limit.
                unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
                data = np.frombuffer(bytearray(unpacked), np.uint8)
            except zlib.error as error:
                raise BadImageError("unreadable-file", error) from None
        return self._whole(data, size, checksum)


class Shards(_Packed):
    """Pictures in WebDataset shards, by the index shards.py wrote beside them. Rows: shard, offset, bytes, CRC."""

    def __init__(self, path: Path):
        name = path / SHARDS_INDEX
        try:
            index = json.loads(name.read_bytes())
            files, names = [str(file) for file in index["files"]], [str(file) for file in index["names"]]
            sizes = np.array(index["sizes"], dtype=np.int64)
            rows = np.array(index["rows"], dtype=np.int64).reshape(-1, 4)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{name}: cannot be read as an index of shards ({error!r})") from None
        shard, offset, size, _ = rows.T
        good = (
            len(sizes) == len(files) and len(rows) == len(names) and (rows >= 0).all() and (shard < len(files)).all()
        )
        if not (good and (offset <= sizes[shard]).all() and (size <= sizes[shard] - offset).all()):
            raise UserError(f"{name}: its files, names and rows do not fit each other; write the shards anew")
        for file, wanted in zip(files, sizes.tolist(), strict=True):
            if Path(file).name != file:
                raise UserError(f"{name}: {file!r} leads out of the folder")
            found = (path / file).stat().st_size if (path / file).is_file() else None
            if found != wanted:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(f"{path / file}: {state}, and {wanted} bytes were written; copy it again")
        super().__init__(path, [path / file for file in files], names, rows)

    def read(self, place: np.ndarray) -> np.ndarray:
        shard, offset, size, checksum = place.tolist()
        check_size(size)
        return self._whole(self._bytes(shard, offset, size), size, checksum)


Store = Folder | Zip | Shards


def open_store(path: Path, follow_links: bool = False) -> Store:
    """The pictures at a path: a folder of them, a zip archive, or a folder of shards. Raises UserError."""
    if path.is_dir():
        return Shards(path) if (path / SHARDS_INDEX).is_file() else Folder(path, follow_links)
    if path.suffix == ".zip" and path.is_file():
        return Zip(path)
    raise UserError(f"{path}: no such folder of images")
