"""Folders that are written completely or not at all.

A folder is written under a temporary name, flushed to the disk, listed with sizes and hashes in MANIFEST.json, and then
renamed. An existing folder is replaced only when the new one is complete.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "MANIFEST.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


def commit(final: Path, write: Callable[[Path], None], step: int | None = None) -> None:
    """Puts what `write(folder)` writes at `final`, replacing what is there only once the new folder is complete."""
    recover(final)
    temporary, replaced = final.with_name(f".tmp-{final.name}"), _replaced(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_whole(temporary, write, step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, half a checkpoint is in the way of the next
        raise
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_whole(temporary: Path, write: Callable[[Path], None], step: int | None) -> None:
    """What `write(folder)` writes, its manifest last, all of it on the disk."""
    temporary.mkdir(parents=True)
    write(temporary)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1))
    for path in (*files, temporary / MANIFEST, temporary):
        _flush(path)


def recover(final: Path) -> None:
    """Puts back what a replacement was about to replace, if it was cut off between its two renames."""
    if _replaced(final).exists() and not final.exists():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            _replaced(final).rename(final)


def _replaced(final: Path) -> Path:
    return final.with_name(f".old-{final.name}")


def verify(folder: Path) -> str | None:
    """None if the checkpoint is complete and unchanged, else what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (match := STEP_FOLDER.fullmatch(folder.name)) and manifest["step"] != int(match[1]):
            return f"{MANIFEST} is of step {manifest['step']}"
        files = manifest["files"]
        expected = {folder / name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for path, (size, digest) in expected.items():
        if not path.is_file():
            return f"{path.relative_to(folder)} is missing"
        if path.stat().st_size != size or _sha256(path) != digest:
            return f"{path.relative_to(folder)} is not what was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Asks the disk to keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
