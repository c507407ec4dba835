"""Checkpoints and exported models of a run.

A checkpoint is complete or absent: pix2seq.manifest writes it under a temporary name, flushes it to the disk, lists
sizes and hashes in MANIFEST.json, and renames it. Older checkpoints are removed after that.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from pix2seq import manifest
from pix2seq.argument_parser import write_training_arguments
from pix2seq.arguments import TrainArguments
from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor
from pix2seq.training.context import TrainContext
from pix2seq.training.trainer_state import TRAINER_FILE

# Errors of open(), safetensors and torch.save on a full, read-only or failing disk.
DISK_ERRORS = (OSError, SafetensorError, RuntimeError)


def write_model(model: Pix2SeqForObjectDetection, args: TrainArguments, folder: Path) -> None:
    """Writes a `from_pretrained` folder and the training arguments, from which evaluate.py takes its defaults."""
    model.save_pretrained(folder)
    Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(folder)
    write_training_arguments(args, folder)


def save(context: TrainContext) -> bool:
    """Saves a checkpoint of the run. All processes call this, the main one writes.

    A disk error does not end the run: the earlier checkpoints stay, and the next save tries again.

    Returns:
        Whether the checkpoint was written, on all processes.
    """
    accelerator, folder = context.accelerator, context.folder
    model = context.models()[""]
    statistics = accelerator.reduce(context.state.meter.statistics, "sum")
    state_dict = context.state.state_dict(context.model, statistics)

    def write(path: Path) -> None:
        write_model(model, context.args, path)
        torch.save(state_dict, path / TRAINER_FILE)

    saved = accelerator.is_main_process
    if accelerator.is_main_process:
        try:
            save_checkpoint(folder.checkpoints, context.step, write, context.args.keep_last)
        except DISK_ERRORS as error:
            folder.log(f"the checkpoint of step {context.step} could not be written ({error})")
            saved = False
    return accelerator.reduce(torch.tensor(float(saved), device=accelerator.device), "sum").item() > 0


def export_model(context: TrainContext, name: str, model: Pix2SeqForObjectDetection) -> bool:
    """Writes best/ or final/ on the main process; returns whether it was written."""
    try:
        manifest.write_folder_atomically(
            context.folder.path / name, lambda path: write_model(model, context.args, path)
        )
    except DISK_ERRORS as error:
        context.folder.log(f"{name}/ could not be written ({error})")
        return False
    return True


def save_checkpoint(checkpoints: Path, step: int, write: Callable[[Path], None], keep_last: int) -> Path:
    """Writes a checkpoint and removes old ones.

    Args:
        checkpoints: folder of all checkpoints.
        step: optimizer steps taken.
        write: writes the content into the folder it is called with.
        keep_last: number of checkpoints to keep, among those up to `step`. Later ones are damaged checkpoints that the
            run could not resume from; they do not count.

    Returns:
        The folder of the checkpoint, step_XXXXXXXX.
    """
    folder = checkpoints / f"step_{step:08d}"
    manifest.write_folder_atomically(folder, write, step)
    for old in [path for path_step, path in _list_checkpoints(checkpoints) if path_step <= step][:-keep_last]:
        shutil.rmtree(old)
    return folder


def latest_checkpoint(checkpoints: Path, warn: Callable[[str], None] = print) -> Path | None:
    """Returns the newest complete checkpoint, and passes a line for each newer, damaged one to `warn`."""
    for _, folder in reversed(_list_checkpoints(checkpoints)):
        error = manifest.verify(folder)
        if error is None:
            return folder
        warn(f"{folder} is skipped: {error}")
    return None


def find_checkpoint(
    checkpoints: Path, resume: str | None, required_files: tuple[str, ...], warn: Callable[[str], None]
) -> Path | None:
    """Returns the checkpoint to resume from, or None for a new run.

    Args:
        checkpoints: folder of all checkpoints of the run.
        resume: value of --resume: None (a new run), "auto" (the newest complete checkpoint, or a new run if there is
            no checkpoint) or a folder.
        required_files: names of files that a folder given as --resume must contain.
        warn: called with a line for each damaged checkpoint that is skipped.

    Raises:
        UserError: the folder is damaged or no checkpoint, all checkpoints are damaged, or existing checkpoints would
            be lost: a new run in a used folder, or an older checkpoint than the newest one.
    """
    if resume is None:
        if _list_checkpoints(checkpoints):
            raise UserError(
                f"--output_dir {checkpoints.parent}: holds checkpoints of an earlier run; "
                "continue it with --resume auto or name another folder"
            )
        return None
    newest = latest_checkpoint(checkpoints, warn)
    if resume == "auto":
        if newest is None and (damaged := [path.name for _, path in _list_checkpoints(checkpoints)]):
            raise UserError(
                f"--resume auto: all checkpoints in {checkpoints} are damaged ({', '.join(damaged)}); "
                "to start anew, move them away or name another --output_dir"
            )
        return newest
    folder = Path(resume)
    if error := manifest.verify(folder):
        raise UserError(f"--resume {folder}: {error}")
    for name in required_files:
        if not (folder / name).is_file():
            raise UserError(f"--resume {folder}: has no {name}; name a folder under checkpoints/")
    if newest is not None and _read_step(newest) > _read_step(folder):
        raise UserError(
            f"--resume {folder}: --output_dir {checkpoints.parent} contains the newer {newest.name}; "
            "use --resume auto or name another --output_dir"
        )
    return folder


def _read_step(folder: Path) -> int:
    return json.loads((folder / manifest.MANIFEST).read_text()).get("step") or 0


def _list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """Step and folder of all checkpoints, complete or not, in the order of the steps."""
    if not checkpoints.is_dir():
        return []
    for path in checkpoints.glob(".old-*"):
        manifest.recover(path.with_name(path.name.removeprefix(".old-")))
    matches = [(manifest.STEP_FOLDER.fullmatch(path.name), path) for path in checkpoints.iterdir()]
    return sorted((int(match[1]), path) for match, path in matches if match)
