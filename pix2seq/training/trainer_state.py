"""The state of a training run besides the weights."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pix2seq.errors import UserError
from pix2seq.training.distributed import load_optimizer_state_dict, optimizer_state_dict
from pix2seq.training.metrics import Meter

TRAINER_FILE = "trainer.pt"
COUNTERS = (
    *("step", "last_evaluated_step", "best_ap", "best_step", "evaluations_since_best"),
    *("num_skipped", "num_consecutive_skipped", "last_searched_step"),
)


@dataclass
class TrainerState:
    """What a run needs, besides the weights, to resume bit-exactly.

    Attributes:
        optimizer: optimizer, wrapped by Accelerate or not.
        scheduler: learning rate schedule.
        scaler: loss scaler of fp16, else None.
        meter: statistics since the last logged step.
        samples_per_step: images per optimizer step, over all processes.
        num_images: size of the training set.
        images_digest: hash of the ids and file names of the training images.
        ema_model: exponential moving average of the weights, or None.
        step: optimizer steps taken.
        last_evaluated_step: last step whose evaluation and samples, if due, are complete.
        best_ap: highest AP so far, of the model in best/.
        best_step: step of the last evaluation with a new best AP.
        evaluations_since_best: evaluations after that one.
        num_skipped: steps not taken because their loss or gradient was not finite.
        num_consecutive_skipped: consecutive skipped steps up to now; the fp16 loss scaler's are not counted.
        last_searched_step: step of the last search for hard negatives.
        hard_negatives: results of the searches, see `TrainDataset`.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler | None
    meter: Meter
    samples_per_step: int
    num_images: int
    images_digest: str = ""
    ema_model: AveragedModel | None = None
    step: int = 0
    last_evaluated_step: int = 0
    best_ap: float = -math.inf
    best_step: int = 0
    evaluations_since_best: int = 0
    num_skipped: int = 0
    num_consecutive_skipped: int = 0
    last_searched_step: int = 0
    hard_negatives: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # without Accelerate's wrapper

    def state_dict(self, model: nn.Module, statistics: torch.Tensor) -> dict:
        """Returns the content of trainer.pt. All processes call this together.

        Args:
            model: model of the optimizer, as prepared by Accelerate.
            statistics: the meter's statistics, summed over all processes.
        """
        return {name: getattr(self, name) for name in COUNTERS} | {
            "samples_per_step": self.samples_per_step,
            "num_images": self.num_images,
            "images_digest": self.images_digest,
            "optimizer": optimizer_state_dict(model, self._torch_optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "ema_model": self.ema_model.state_dict() if self.ema_model is not None else None,
            "statistics": statistics.cpu(),
            "hard_negatives": dict(self.hard_negatives),
        }

    def load_state_dict(self, state_dict: dict, model: nn.Module, is_main_process: bool) -> None:
        """Restores `state_dict`. All processes call this together.

        Raises:
            UserError: the steps of this run consist of other images than those of the checkpoint.
        """
        if state_dict["samples_per_step"] != self.samples_per_step:
            raise UserError(
                "--resume: batch_size x gradient_accumulation_steps x processes is "
                f"{self.samples_per_step}; the checkpoint has {state_dict['samples_per_step']}"
            )
        if state_dict["num_images"] != self.num_images:
            raise UserError(
                f"--resume: the training set has {self.num_images} images; "
                f"the checkpoint was trained on {state_dict['num_images']}"
            )
        if state_dict["images_digest"] != self.images_digest:
            raise UserError("--resume: the ids or file names of the training images differ from the checkpoint's")
        for name in COUNTERS:
            setattr(self, name, state_dict.get(name, 0))  # older checkpoints lack some, which start at 0
        self.hard_negatives.update(state_dict.get("hard_negatives", {}))
        load_optimizer_state_dict(model, self._torch_optimizer, state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        # The schedule depends on --max_steps, which may be larger now, so the rate is computed anew.
        learning_rates = [
            base_lr * factor(self.scheduler.last_epoch)
            for base_lr, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        self.scheduler._last_lr = learning_rates
        for group, learning_rate in zip(self._torch_optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        if self.scaler is not None and state_dict["scaler"]:
            self.scaler.load_state_dict(state_dict["scaler"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(state_dict["ema_model"])
        if is_main_process:  # the saved statistics are the sum over all processes
            self.meter.statistics += state_dict["statistics"].to(self.meter.statistics.device)
