"""Where a run stands: what a checkpoint holds beside the weights."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pix2seq.errors import UserError
from pix2seq.training.metrics import Meter
from pix2seq.training.sharding import load_optimizer_state, optimizer_state

FILE = "trainer.pt"
FORMAT = 3  # of its content
SAME_BUT_FOR_STATISTICS = 2  # such a checkpoint is read, and the row it was in the middle of begins anew


@dataclass
class TrainerState:
    """What a run needs to go on as if it had not stopped.

    samples_per_step   images of an optimizer step, on all processes
    num_images         in the training set        images   a digest of their ids and names
    step               optimizer steps taken
    reported           the last step whose evaluation and picture, if due, are done
    skipped            steps not taken because their loss or gradient was not finite; skipped_in_a_row, the latest ones
    average            the weights averaged over the steps, if they are
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    meter: Meter
    samples_per_step: int
    num_images: int
    images: str = ""
    step: int = 0
    reported: int = 0
    best_ap: float = -math.inf
    skipped: int = 0
    skipped_in_a_row: int = 0
    average: AveragedModel | None = None

    def content(self, model: nn.Module, statistics: torch.Tensor) -> dict:
        """What `save` writes. All ranks call this. `statistics`: the meter's, summed over all ranks."""
        return {
            "format": FORMAT,
            "step": self.step,
            "reported": self.reported,
            "best_ap": self.best_ap,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "samples_per_step": self.samples_per_step,
            "num_images": self.num_images,
            "images": self.images,
            "optimizer": optimizer_state(model, self._torch_optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "average": self.average.state_dict() if self.average is not None else None,
            "statistics": statistics.cpu(),
        }

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # without Accelerate's wrapper

    def load(self, folder: Path, model: nn.Module, is_main: bool) -> None:
        """Raises UserError if the steps of this run are not of the images that the checkpoint's were."""
        content = torch.load(folder / FILE, map_location="cpu", weights_only=True)  # nothing in the file can run code
        if content.get("format") not in (FORMAT, SAME_BUT_FOR_STATISTICS):
            raise UserError(
                f"--resume {folder}: was written by another version of the code, whose state has another form"
            )
        if content["samples_per_step"] != self.samples_per_step:
            raise UserError(
                f"--resume {folder}: batch_size x gradient_accumulation_steps x processes is "
                f"{self.samples_per_step} and was {content['samples_per_step']}"
            )
        if content["num_images"] != self.num_images:
            raise UserError(
                f"--resume {folder}: the training set has {self.num_images} images and had {content['num_images']}"
            )
        if content.get("images", self.images) != self.images:
            raise UserError(
                f"--resume {folder}: the training set has as many images, but not those (other ids or file names)"
            )
        self.step, self.reported, self.best_ap = content["step"], content["reported"], content["best_ap"]
        self.skipped, self.skipped_in_a_row = content["skipped"], content["skipped_in_a_row"]
        load_optimizer_state(model, self._torch_optimizer, content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        # The schedule's rate of the next step, which is not the checkpoint's if the run has been made longer.
        rates = [
            peak * share(self.scheduler.last_epoch)
            for peak, share in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        self.scheduler._last_lr = rates
        for group, rate in zip(self._torch_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.scaler is not None and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        if is_main and content["format"] == FORMAT:  # the sum over all ranks, so one of them carries it on
            self.meter.statistics += content["statistics"].to(self.meter.statistics.device)
