"""Checks of the files and folders that a command writes. They come before any work, and no input is overwritten."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pix2seq.errors import UserError


def check_output_file(path: Path, inputs: Iterable[Path] = (), flag: str = "--output") -> None:
    """Checks that a file is writable and is not an input.

    Args:
        path: The file.
        inputs: Files that the command reads.
        flag: The flag that names the file.

    Raises:
        UserError: The file cannot be written or is an input.
    """
    check_no_input([path], inputs, f"{flag} {path}")
    try:
        target = path.resolve()  # creates and removes the target of a broken link, not the link
        is_new = not target.exists()
        target.open("ab").close()
        if is_new:
            target.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror})") from None


def check_no_input(outputs: Iterable[Path], inputs: Iterable[Path], name: str) -> None:
    """Checks that no output is the same file as an input, under any name.

    Args:
        outputs: Files that the command may write.
        inputs: Files that the command reads.
        name: Flag and value that name the outputs.

    Raises:
        UserError: An input would be overwritten.
    """
    existing = {_identity(path): path for path in outputs}
    existing.pop(None, None)
    for path in inputs if existing else ():
        if (output := existing.get(_identity(path))) is not None:
            raise UserError(f"{name}: would overwrite the input {output}; name another")


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns the device and the number of a file, which all of its names share; None if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # names may contain NUL
        return None
    return status.st_dev, status.st_ino


def prepare_output_folder(folder: Path, flag: str = "--output_dir") -> None:
    """Creates a folder and checks that it is writable.

    Args:
        folder: The folder.
        flag: The flag that names the folder.

    Raises:
        UserError: The folder cannot be written to.
    """
    with report_write_errors(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def report_write_errors(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Converts an OSError to a UserError that names the flag and the folder."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename) if isinstance(error.filename, str) else folder
        file = "" if path == folder else f"{path.name}: "
        raise UserError(f"{flag} {folder}: cannot be written to ({file}{error.strerror or error})") from None
