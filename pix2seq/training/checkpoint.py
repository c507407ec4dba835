"""The commit protocol of checkpoints: complete or absent, never half.

A checkpoint is written under a name that nobody reads, flushed to the disk, listed with sizes and hashes in
MANIFEST.json, and only then renamed. Older ones are removed after that. What lies in it is the caller's business.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from pix2seq.errors import UserError
from pix2seq.manifest import MANIFEST, STEP_FOLDER, commit, recover, verify


def save(checkpoints: Path, step: int, write: Callable[[Path], None], keep_last: int) -> Path:
    """Makes checkpoints/step_XXXXXXXX by calling `write(folder)`, then removes all but `keep_last` up to that step.

    Folders of later steps are left alone: a broken one that a run fell back from must not count as one kept.
    """
    final = checkpoints / f"step_{step:08d}"
    commit(final, write, step)
    for old in [path for number, path in _by_step(checkpoints) if number <= step][:-keep_last]:
        shutil.rmtree(old)
    return final


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
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    return sorted(found)
