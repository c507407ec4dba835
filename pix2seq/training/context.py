"""The parts of a training run."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pix2seq.arguments import TrainArguments
from pix2seq.data import StepSampler, TrainDataset
from pix2seq.data.unreadable import UnreadableImages
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.tokenizer import Tokenizer
from pix2seq.training.distributed import gather_full_model
from pix2seq.training.evaluator import TrainingEvaluator
from pix2seq.training.plateau import PlateauHint
from pix2seq.training.preemption import StopRequest
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.trainer_state import TrainerState


@dataclass
class TrainContext:
    """The parts of a training run.

    Attributes:
        args: arguments of the run.
        accelerator: Accelerate's view of the processes and devices.
        folder: run folder.
        train_set: training images, augmented, with their token sequences.
        evaluator: evaluates models on the validation images.
        sampler: order of the training images.
        max_steps: optimizer steps of the whole run.
        model: the model that is trained, as prepared by Accelerate.
        state: optimizer, schedule and counters.
        stop: true after a stop signal to this process.
        unreadable: training images that are missing or broken, on all processes.
        plateau: hints at the plateau of x1.
    """

    args: TrainArguments
    accelerator: Accelerator
    folder: RunFolder
    train_set: TrainDataset
    evaluator: TrainingEvaluator
    sampler: StepSampler
    max_steps: int
    model: torch.nn.Module
    state: TrainerState
    stop: StopRequest
    unreadable: UnreadableImages
    plateau: PlateauHint

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        return self.train_set.sequence_builder.tokenizer

    @property
    def unwrapped_model(self) -> Pix2SeqForObjectDetection:
        """The trained model without DDP and compilation; only this process's part of it with FSDP."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def models(self) -> dict[str, Pix2SeqForObjectDetection]:
        """The models to evaluate, by name: "" is the trained one, "ema" its moving average, if there is one.

        All processes call this together.
        """
        models = {"": gather_full_model(self.unwrapped_model)}
        if self.state.ema_model is not None:
            models["ema"] = self.state.ema_model.module  # type: ignore[assignment]  # of AveragedModel
        return models

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def is_finished(self) -> bool:
        """Whether all steps are taken, or training was stopped early."""
        return self.step == self.max_steps or bool(self.early_stop_reason)

    @property
    def early_stop_reason(self) -> str:
        """Why training stopped before its last step, or ""."""
        patience, count = self.args.early_stopping_patience, self.state.evaluations_since_best
        if self.step == self.max_steps or not 0 < patience <= count:
            return ""
        return f"no new best AP in {count} evaluations (--early_stopping_patience {patience})"

    def count_evaluation(self) -> None:
        """Counts the evaluations since the best AP. All processes call this together, and stop at the same step."""
        since_best = 0 if self.state.best_step == self.step else self.state.evaluations_since_best + 1
        # Only the main process knows the AP.
        self.state.evaluations_since_best = broadcast_object_list([since_best])[0]

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) is due after the current step."""
        return every > 0 and self.step % every == 0
