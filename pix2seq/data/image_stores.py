"""Image stores: folders and shards of images.

A store locates images by the file names of an annotation file and reads their bytes. It opens no file outside its
folder.
"""

import json
import os
import unicodedata
import zlib
from pathlib import Path

import numpy as np

from pix2seq.data.image_files import BadImageError, check_num_bytes, read_file
from pix2seq.errors import UserError

SHARDS_INDEX = "shards.json"


class FolderStore:
    """Image files below a folder.

    Args:
        path: The folder.
        follow_links: Also open files behind symbolic links that leave the folder.
    """

    def __init__(self, path: Path, follow_links: bool = False):
        self.path, self.follow_links = path, follow_links

    def locate(self, names: list[str]) -> tuple[np.ndarray, dict[int, BadImageError]]:
        """Finds images by name.

        Args:
            names: File names, relative to the folder.

        Returns:
            Locations (N, ...) to pass to `read`, and errors by index. A name that exists in another Unicode
            normalization form has a location and the error "other-unicode-form".
        """
        listings: dict[str, tuple] = {}
        locations, errors = [], {}
        for index, name in enumerate(names):
            location, error = self._locate(name, listings)
            locations.append(location)
            if error is not None:
                errors[index] = error
        # An array, because reading Python objects copies their memory pages in forked workers (reference counts).
        return np.array(locations, dtype=np.dtypes.StringDType()), errors

    def _locate(self, name: str, listings: dict[str, tuple]) -> tuple[str, BadImageError | None]:
        if os.path.isabs(name) or ".." in name.split("/") or "\0" in name:
            return "", BadImageError("path-outside", "the path leads out of the folder of images")
        folder, _, file = name.rpartition("/")
        if folder not in listings:
            listings[folder] = self._list_folder(folder)
        is_allowed, by_nfc, problem = listings[folder]
        error = None
        if file not in is_allowed:
            file = by_nfc.get(unicodedata.normalize("NFC", file))
            if file is None:
                return "", BadImageError("missing-file", problem or "no such file in the folder of images")
            error = BadImageError("other-unicode-form", "the file name on disk has another Unicode normalization form")
        if not is_allowed[file]:
            reason = "a symbolic link out of the folder of images (--follow_links allows it)"
            return "", BadImageError("path-outside", reason)
        return f"{folder}/{file}".lstrip("/"), error

    def _list_folder(self, folder: str) -> tuple[dict[str, bool], dict[str, str], str | None]:
        """Lists the files of a folder once, because a look-up per file would be slow on network file systems.

        Returns:
            Whether each file may be opened, non-ASCII names by their NFC form, and a reason if the listing fails.
        """
        base = os.path.realpath(self.path)

        def is_inside(path) -> bool:
            return self.follow_links or os.path.commonpath([base, os.path.realpath(path)]) == base

        is_allowed = {}
        try:
            folder_is_inside = is_inside(self.path / folder)
            with os.scandir(self.path / folder) as entries:
                for entry in entries:
                    try:
                        if entry.is_file():
                            is_allowed[entry.name] = folder_is_inside and (
                                not entry.is_symlink() or is_inside(entry.path)
                            )
                    except OSError:  # a symbolic link to itself
                        continue
        except FileNotFoundError:
            pass
        except OSError as error:
            return {}, {}, f"its folder cannot be read ({error.strerror})"
        by_nfc = {unicodedata.normalize("NFC", name): name for name in is_allowed if not name.isascii()}
        return is_allowed, by_nfc, None

    def read(self, location: str) -> np.ndarray:
        """Reads the bytes of an image: uint8 (num_bytes,). Raises BadImageError."""
        return read_file(self.path / location)


class ShardStore:
    """Images in WebDataset shards, found by the index of `write_shards`.

    A location is a row of numbers: shard, offset, size, CRC-32. The files are read here and not by `tarfile`, whose
    objects grow the memory of every worker and share one file position after a fork.

    Args:
        path: The folder of the shards.
    """

    def __init__(self, path: Path):
        index_file = path / SHARDS_INDEX
        try:
            index = json.loads(index_file.read_bytes())
            files, names = [str(file) for file in index["files"]], [str(name) for name in index["names"]]
            file_sizes = np.array(index["sizes"], dtype=np.int64)
            rows = np.array(index["rows"], dtype=np.int64).reshape(-1, 4)
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{index_file}: cannot be read as an index of shards ({error!r})") from None
        shard, offset, size, _ = rows.T
        is_valid = len(file_sizes) == len(files) and len(rows) == len(names) and (rows >= 0).all()
        is_valid = is_valid and (shard < len(files)).all() and (size <= file_sizes[shard] - offset).all()
        if not is_valid:
            raise UserError(f"{index_file}: its files, names and rows contradict each other; write the shards again")
        for file, expected in zip(files, file_sizes.tolist(), strict=True):
            if Path(file).name != file:
                raise UserError(f"{index_file}: {file!r} leads out of the folder")
            actual = (path / file).stat().st_size if (path / file).is_file() else None
            if actual != expected:
                state = "is missing" if actual is None else f"has {actual} bytes"
                raise UserError(f"{path / file}: {state}, expected {expected} bytes; copy the file again")
        self.path, self._files, self._names, self._rows = path, [path / file for file in files], names, rows
        self._descriptors: dict[int, int] = {}

    def __getstate__(self):  # for workers that are spawned
        return self.__dict__ | {"_descriptors": {}, "_names": [], "_rows": None}

    def locate(self, names: list[str]) -> tuple[np.ndarray, dict[int, BadImageError]]:
        """See `FolderStore.locate`."""
        row_of_name = {name: row for row, name in enumerate(self._names)}
        rows = [row_of_name.get(name, -1) for name in names]
        errors = {
            index: BadImageError("missing-file", f"not in {self.path.name}")
            for index, row in enumerate(rows)
            if row == -1
        }
        missing = np.full((1, self._rows.shape[1]), -1)
        return np.append(self._rows, missing, axis=0)[rows], errors

    def read(self, location: np.ndarray) -> np.ndarray:
        """See `FolderStore.read`."""
        shard, offset, size, checksum = location.tolist()
        check_num_bytes(size)
        data = self._read_range(shard, offset, size)
        if zlib.crc32(data.data) != checksum:
            raise BadImageError("unreadable-file", f"damaged: its checksum does not match {self.path.name}")
        return data

    def _read_range(self, file_index: int, offset: int, num_bytes: int) -> np.ndarray:
        file = self._files[file_index]
        try:
            if file_index not in self._descriptors:
                self._descriptors[file_index] = os.open(file, os.O_RDONLY)
            data = np.empty(num_bytes, dtype=np.uint8)
            # `preadv` does not move the file position, which forked workers share.
            count = os.preadv(self._descriptors[file_index], [data.data], offset)
        except (OSError, MemoryError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error  # str(OSError) includes the path
            raise BadImageError("unreadable-file", f"{file.name}: {reason}") from None
        if count != num_bytes:
            raise BadImageError("unreadable-file", f"{file.name} is truncated")
        return data


ImageStore = FolderStore | ShardStore


def open_store(path: Path, follow_links: bool = False) -> ImageStore:
    """Opens a folder of images, or of shards.

    Raises:
        UserError: There is no such folder, or the index of the shards is damaged.
    """
    if path.is_dir():
        return ShardStore(path) if (path / SHARDS_INDEX).is_file() else FolderStore(path, follow_links)
    if path.suffix.lower() == ".zip" and path.is_file():
        raise UserError(f"{path}: is a zip archive; unpack it and name the folder of its images")
    raise UserError(f"{path}: no such folder of images")
