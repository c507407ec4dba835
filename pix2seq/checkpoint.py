"""The commit protocol of checkpoints: complete or absent, never half.

A checkpoint is written under a name that nobody reads, flushed to the disk, listed with sizes and hashes in
MANIFEST.json, and only then renamed. Older ones are removed after that. What lies in it is the caller's business.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pix2seq.errors import UserError

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step_(\d{8,})")


def save(checkpoints: Path, step: int, write: Callable[[Path], None], keep_last: int) -> Path:
    """Makes checkpoints/step_XXXXXXXX by calling `write(folder)`, then removes all but `keep_last` up to that step.

    Folders of later steps are left alone: a broken one that a run fell back from must not count as one kept.
    """
    final = checkpoints / f"step_{step:08d}"
    commit(final, write, step)
    for old in [path for number, path in _by_step(checkpoints) if number <= step][:-keep_last]:
        shutil.rmtree(old)
    return final


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
        str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": _hash(path)} for path in files
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
        if (match := _NAME.fullmatch(folder.name)) and manifest["step"] != int(match[1]):
            return f"{MANIFEST} is of step {manifest['step']}"
        files = manifest["files"]
        expected = {folder / name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for path, (size, digest) in expected.items():
        if not path.is_file():
            return f"{path.relative_to(folder)} is missing"
        if path.stat().st_size != size or _hash(path) != digest:
            return f"{path.relative_to(folder)} is not what was written"
    return None


def latest(checkpoints: Path, warn: Callable[[str], None] = print) -> Path | None:
    """The newest complete checkpoint. Says which newer ones it passes over, and why."""
    for _, folder in reversed(_by_step(checkpoints)):
        fault = verify(folder)
        if fault is None:
            return folder
        warn(f"{folder} is passed over: {fault}")
    return None


def find(checkpoints: Path, resume: str | None, required: tuple[str, ...], log: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, verified and holding the `required` files; None for a new run.

    resume   the flag: None (a new run), "auto" (the newest complete checkpoint, if any) or a folder. Raises UserError
             where work would be lost: a new run in a used folder, or an older checkpoint than the newest.
    """
    newest = latest(checkpoints, log)
    run = checkpoints.parent
    if resume is None:
        if newest is not None:
            raise UserError(
                f"--output_dir {run}: holds checkpoints of an earlier run; "
                "continue it with --resume auto or name another folder"
            )
        return None
    if resume == "auto":
        return newest
    found = Path(resume)
    if fault := verify(found):
        raise UserError(f"--resume {found}: {fault}")
    for name in required:
        if not (found / name).is_file():
            raise UserError(f"--resume {found}: has no {name}; name a folder under checkpoints/")
    if newest is not None and _step(newest) > _step(found):
        raise UserError(
            f"--resume {found}: --output_dir {run} has {newest.name}, which this would abandon; "
            "use --resume auto or name another folder"
        )
    return found


def _step(folder: Path) -> int:
    return json.loads((folder / MANIFEST).read_text()).get("step") or 0


def _by_step(checkpoints: Path) -> list[tuple[int, Path]]:
    if not checkpoints.is_dir():
        return []
    for path in checkpoints.glob(".old-*"):
        recover(path.with_name(path.name.removeprefix(".old-")))
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Asks the disk to keep a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
