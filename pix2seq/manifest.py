"""Atomically written folders: a folder is complete or absent, even after kill -9 or on a full disk.

A folder is written under a temporary name and flushed to the disk. MANIFEST.json, written last, lists the size and the
hash of each file. Only then is the folder renamed; an existing folder is replaced only by a complete one.
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


def write_folder_atomically(folder: Path, write: Callable[[Path], None], step: int | None = None) -> None:
    """Creates or replaces a folder.

    Args:
        folder: Final path of the folder.
        write: Called as `write(temporary_folder)`, creates the files. If it raises, an existing folder is unchanged.
        step: Training step to record in the manifest.
    """
    recover(folder)
    temporary, replaced = folder.with_name(f".tmp-{folder.name}"), _replaced_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _write_manifest(temporary, step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, the next attempt needs the space
        raise
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    temporary.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> None:
    """Restores the old folder if a replacement was killed between its two renames."""
    if _replaced_path(folder).exists() and not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # another process restored it first
            _replaced_path(folder).rename(folder)


def verify(folder: Path) -> str | None:
    """Checks a folder against its manifest.

    Returns:
        None if all files are complete and unchanged, otherwise a description of the first problem.
    """
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
            return f"{path.relative_to(folder)} is damaged: its size or hash differs from {MANIFEST}"
    return None


def _write_manifest(folder: Path, step: int | None) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": entries}, indent=1))
    for path in (*files, folder / MANIFEST, folder):
        _fsync(path)


def _replaced_path(folder: Path) -> Path:
    return folder.with_name(f".old-{folder.name}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
