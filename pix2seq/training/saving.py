"""Leaving things behind: checkpoints to resume from, and the best and the final detector. A full disk ends no run."""

from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from pix2seq import manifest
from pix2seq.argument_parser import write_training_arguments
from pix2seq.arguments import TrainArguments
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor
from pix2seq.training import checkpoint, trainer_state
from pix2seq.training.setup import TrainContext

# What a full, read-only or failing disk raises from open(), safetensors and torch.save.
DISK_ERRORS = (OSError, SafetensorError, RuntimeError)


def write_model(detector: Pix2SeqForObjectDetection, args: TrainArguments, path: Path) -> None:
    """A from_pretrained folder, and the flags it was trained with: evaluate.py takes its defaults from them."""
    detector.save_pretrained(path)
    Pix2SeqImageProcessor.for_detector(detector.config).save_pretrained(path)
    write_training_arguments(args, path)


def save(training: TrainContext) -> bool:
    """A checkpoint to resume from. Every rank calls this; the main one writes. A full disk ends no run: training goes
    on with the last good checkpoint, and the next one is tried again. Returns whether it was written."""
    accelerator, folder = training.accelerator, training.folder
    detector = training.detectors()[""]
    state = training.state.content(training.model, accelerator.reduce(training.state.meter.statistics, "sum"))

    def write(path: Path) -> None:
        write_model(detector, training.args, path)
        torch.save(state, path / trainer_state.FILE)

    written = True
    if accelerator.is_main_process:
        try:
            checkpoint.save(folder.checkpoints, training.step, write, training.args.keep_last)
        except DISK_ERRORS as error:
            folder.log(f"the checkpoint of step {training.step} could not be written ({error})")
            written = False
    answer = torch.tensor(float(written and accelerator.is_main_process), device=accelerator.device)
    return accelerator.reduce(answer, "sum").item() > 0


def export_model(training: TrainContext, name: str, detector: Pix2SeqForObjectDetection) -> bool:
    """best/ or final/, by the main process. Returns whether it was written."""
    try:
        manifest.commit(training.folder.path / name, partial(write_model, detector, training.args))
    except DISK_ERRORS as error:
        training.folder.log(f"{name}/ could not be written ({error})")
        return False
    return True
