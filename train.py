"""Trains a detector: `accelerate launch train.py --root /path/to/coco`, or `--config configs/overfit.yaml`.

From image to loss in five hops: `loop` here -> `TrainDataset.__getitem__` (data.py) -> `TrainTransform`
(transforms.py) and `SequenceBuilder` (sequence.py) -> `train_step` here -> `Pix2SeqForObjectDetection.forward`
(model/detector.py). `--help` lists the flags; run_folder.py says what a run leaves behind.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, gather_object, set_seed
from safetensors import SafetensorError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import get_scheduler
from transformers.utils import logging as transformers_logging

from pix2seq import checkpoint, trainer_state
from pix2seq.coco import Categories, find_split, load_annotations
from pix2seq.command_line import FLAGS_FILE, changed_flags, parse, read_flags, to_yaml, write_flags
from pix2seq.config import FREE_ON_FINE_TUNING, FREE_ON_RESUME, Arguments, ModelArguments, model_flags
from pix2seq.data import EvalDataset, StepSampler, TrainDataset, train_loader
from pix2seq.decoding import DecodingOptions
from pix2seq.errors import UserError
from pix2seq.metrics import Meter, describe, token_statistics
from pix2seq.model import Pix2SeqForObjectDetection, adapt, build_detector, load_detector
from pix2seq.optimizer import parameter_groups
from pix2seq.preemption import Stopped, StopRequest
from pix2seq.processing import Pix2SeqImageProcessor
from pix2seq.reporting import Reporter
from pix2seq.run_folder import RunFolder
from pix2seq.scoring import load_ground_truth, metrics_table
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.trainer_state import TrainerState
from pix2seq.transforms import EvalTransform, TrainTransform

# What a full, read-only or failing disk raises from open(), safetensors and torch.save.
DISK_ERRORS = (OSError, SafetensorError, RuntimeError)


class NotSaved(RuntimeError):
    """A run ends without the checkpoint it should leave behind."""


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row whose loss or gradient is NaN or infinite. None of them was taken."""


@dataclass
class Training:
    """What a run consists of."""

    args: Arguments
    accelerator: Accelerator
    folder: RunFolder
    train_set: TrainDataset
    reporter: Reporter
    sampler: StepSampler
    max_steps: int
    model: torch.nn.Module
    state: TrainerState
    stop: StopRequest

    @property
    def detector(self) -> Pix2SeqForObjectDetection:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def detectors(self) -> dict[str, Pix2SeqForObjectDetection]:
        """Those to evaluate, by name: the one that learns, and its average over the steps if there is one."""
        average = self.state.average
        return {"": self.detector} | ({"ema": average.module} if average is not None else {})

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def is_last_step(self) -> bool:
        return self.step == self.max_steps

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


def main(args: Arguments) -> int:
    """One training run; returns the exit code. The user's mistakes are told in one line, and how a run that has begun
    ended is noted in its status.json, unless the fault was on another process than the main one."""
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    try:
        training = start(args, stop)
    except UserError as error:
        if rank == 0:  # all ranks read the same files and find the same fault
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    try:
        return run(training)
    except (UserError, NonFiniteLoss, NotSaved) as error:
        training.folder.status("failed", training.step, str(error))
        print(f"train.py: error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        if not isinstance(error, UserError):
            return 1
        if training.accelerator.num_processes == 1 and save(training):  # others have gone on and cannot be asked
            print(f"train.py: saved at step {training.step}; --resume auto continues from there", file=sys.stderr)
        return 2
    except BaseException as error:
        training.folder.status("failed", training.step, repr(error))
        raise


def run(training: Training) -> int:
    """From the first step to what is left behind; returns the exit code."""
    accelerator, folder, stop = training.accelerator, training.folder, training.stop
    try:
        loop(training)
        saved = save(training)
    except Stopped:
        if not save(training):
            raise NotSaved(f"{stop.name}: the checkpoint of step {training.step} could not be written") from None
        folder.status("preempted", training.step, stop.name)
        folder.log(f"{stop.name}: saved at step {training.step}; the same command with --resume auto continues")
        accelerator.end_training()
        return stop.exit_code
    if accelerator.is_main_process:
        detector = training.detectors.get("ema", training.detector)
        saved = keep_detector(training, "final", detector) and saved
    accelerator.wait_for_everyone()
    if not saved:
        raise NotSaved(f"{folder.path}: the last checkpoint or final/ could not be written")
    folder.status("finished", training.step)
    folder.log(f"finished: {folder.path}; best AP {training.state.best_ap:.4f} in best/, the last in final/")
    accelerator.end_training()
    return 0


def start(args: Arguments, stop: StopRequest) -> Training:
    """Everything before the first step. Raises UserError for what the user has to mend."""
    accelerator = join_processes(args)
    # What the launcher chose is part of the run: evaluate.py and a resumed run go by it.
    args.mixed_precision = accelerator.mixed_precision
    transformers_logging.disable_progress_bar()
    set_seed(args.seed, deterministic=args.deterministic)
    training = build(args, accelerator, RunFolder(args.output_dir, accelerator.is_main_process), stop)
    announce(training)
    return training


def join_processes(args: Arguments) -> Accelerator:
    known = [kind.value for kind in LoggerType if kind is not LoggerType.ALL]
    installed = [str(kind) for kind in get_available_trackers()]
    for name in args.report_to:  # Accelerate leaves out trackers that are not installed without a word
        if name not in known:
            raise UserError(f"--report_to {name}: must be none or among {', '.join(known)}")
        if name not in installed:
            raise UserError(f"--report_to {name}: is not installed (pip install {name})")
    try:
        accelerator = Accelerator(
            # Without it, processes on a CPU do not find each other. Apple's GPUs have no float64.
            cpu=not torch.cuda.is_available(),
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
    except ValueError as error:  # fp16 where there is no GPU, say
        raise UserError(f"--mixed_precision {args.mixed_precision}: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RuntimeError(f"launched as {os.environ['WORLD_SIZE']} processes, of which Accelerate joined 1")
    return accelerator


def build(args: Arguments, accelerator: Accelerator, folder: RunFolder, stop: StopRequest) -> Training:
    """Reads the data and builds everything, from the checkpoint to resume from if there is one."""
    resumed = checkpoint.find(folder.checkpoints, args.resume, (trainer_state.FILE, FLAGS_FILE), folder.log)
    then = read_flags(resumed, "--resume") if resumed is not None else {}
    if resumed is not None and args.init_from is not None and not model_flags(args.init_from):
        for name, field in ModelArguments.__dataclass_fields__.items():  # what it started from has gone, and may
            setattr(args, name, then.get(name, field.default))
    train_set, val_set = load_data(args)
    categories, num_images = train_set.annotations.categories, len(train_set.annotations)
    if resumed is not None:
        if changed := changed_flags(then, args, FREE_ON_RESUME):
            raise UserError(f"--resume {resumed}: a resumed run keeps its flags; changed: {changed}")
        model = load_detector(resumed, "--resume").train()
        if Categories(tuple(model.config.category_ids), model.config.class_names) != categories:
            raise UserError(f"--resume {resumed}: its classes are not those of {train_set.annotations.split.json}")
    else:
        model = new_detector(args, categories, folder)

    world, rank = accelerator.num_processes, accelerator.process_index
    model.backbone.prepare_for_training(
        args.freeze_backbone, args.batch_norm, world, accelerator.device, model.config.image_size
    )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sampler = StepSampler(num_images, args.batch_size, args.gradient_accumulation_steps, rank, world, args.seed)
    max_steps = args.max_steps or math.ceil(args.num_epochs * num_images / sampler.samples_per_step)
    lr_backbone = args.lr if args.lr_backbone is None else args.lr_backbone
    groups = parameter_groups(model, args.lr, lr_backbone, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2))
    # The scheduler is not prepared: Accelerate would step it once per process.
    specific = {"lr_end": 0.0} if args.lr_scheduler == "polynomial" else None
    scheduler = get_scheduler(args.lr_scheduler, optimizer, args.warmup_steps, max_steps, specific)
    average = None
    if args.ema_decay:
        average = AveragedModel(model, accelerator.device, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    model, optimizer = accelerator.prepare(model, optimizer)
    state = TrainerState(
        *(optimizer, scheduler, accelerator.scaler, Meter(accelerator.device)),
        samples_per_step=sampler.samples_per_step,
        num_images=num_images,
        average=average,
    )
    if resumed is not None:
        state.load(resumed, accelerator.is_main_process)
        if state.step > max_steps:
            raise UserError(f"--resume {resumed}: it is past --max_steps {max_steps}")
        if not (folder.path / "best").exists():  # this folder is not the one the checkpoint comes from
            state.best_ap = -math.inf
        folder.log(f"resumed from {resumed}")
    sampler.start_step = state.step
    truth = load_ground_truth(val_set.annotations.split.json, val_set.annotations.image_ids, categories)
    options = DecodingOptions(args.max_objects, args.top_p, args.temperature, args.seed)

    def should_stop() -> bool:
        return sum_over_ranks(accelerator, float(bool(stop)))[0] > 0

    reporter = Reporter(
        folder, accelerator, val_set, truth, options, args.eval_batch_size, args.num_workers, should_stop
    )
    return Training(args, accelerator, folder, train_set, reporter, sampler, max_steps, model, state, stop)


def new_detector(args: Arguments, categories: Categories, folder: RunFolder) -> Pix2SeqForObjectDetection:
    """From scratch, or from the detector to fine-tune."""
    values = {name: getattr(args, name) for name in ModelArguments.__dataclass_fields__} | {
        "category_ids": categories.ids,
        "class_names": categories.names,
        "decoding": {"top_p": args.top_p, "temperature": args.temperature, "seed": args.seed},
    }
    if args.init_from is None:
        return build_detector(**values)
    source = load_detector(args.init_from, "--init_from")
    shape = model_flags(args.init_from)
    if not shape:
        raise UserError(f"--init_from {args.init_from}: has no {FLAGS_FILE}, which says how it was made")
    for name in ModelArguments.__dataclass_fields__.keys() - FREE_ON_FINE_TUNING:
        had = shape.get(name, ModelArguments.__dataclass_fields__[name].default)
        if values[name] != had:
            raise UserError(f"--{name} {values[name]}: the detector of --init_from has {had}; leave this flag out")
    free = FREE_ON_FINE_TUNING | {"category_ids", "class_names", "decoding"}
    model, report = adapt(source, **{name: values[name] for name in free})
    for line in report:
        folder.log(f"--init_from {args.init_from}: {line}")
    return model


def load_data(args: Arguments) -> tuple[TrainDataset, EvalDataset]:
    """The images to train on, as sentences, and those to evaluate."""
    train = load_annotations(find_split("train", args.root, args.train_images, args.train_json))
    if not train.trainable.any():
        raise UserError(f"{train.split.json}: holds no objects to train on")
    if args.overfit:
        train = val = train.subset(range(min(args.overfit, len(train))))
    else:
        val = load_annotations(find_split("val", args.root, args.val_images, args.val_json), train.categories)
    builder = SequenceBuilder(
        Tokenizer(len(train.categories.ids), args.num_bins),
        max_objects=args.max_objects,
        order=args.object_order,
        noise_objects=args.noise_objects,
        class_corruption=args.class_corruption,
        noise_weight=args.noise_weight,
        eos_weight=args.eos_weight,
    )
    transform = TrainTransform(args.image_size, args.scale_min, args.scale_max, args.flip, args.color_jitter)
    return TrainDataset(train, transform, builder, args.seed), EvalDataset(val, EvalTransform(args.image_size))


def announce(training: Training) -> None:
    """Makes the run folder, starts the trackers and says what is about to happen."""
    args, accelerator, folder = training.args, training.accelerator, training.folder
    try:
        folder.describe(to_yaml(args), accelerator.device, accelerator.num_processes)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: cannot be written to ({error.strerror})") from None
    folder.rewind_metrics(training.step, keep_evaluation=training.state.reported == training.step)
    folder.status("running", training.step)
    # As text where a value is not a plain one: TensorBoard takes nothing else.
    flags = {k: v if isinstance(v, int | float) else str(v) for k, v in yaml.safe_load(to_yaml(args)).items()}
    try:
        accelerator.init_trackers(args.project_name, flags)
    except Exception as error:  # each tracker has errors of its own
        fault = UserError(f"--report_to {' '.join(args.report_to)}: cannot be started ({error})")
        folder.status("failed", training.step, str(fault))
        raise fault from None
    folder.trackers = accelerator.trackers
    folder.log(f"train: {training.train_set.annotations.summary(args.max_objects)}")
    folder.log(f"val:   {training.reporter.val_set.annotations.summary(args.max_objects)}")
    folder.log(
        f"{sum(p.numel() for p in training.model.parameters()) / 1e6:.1f} M parameters on {accelerator.device}; "
        f"steps {training.step} to {training.max_steps} of {training.sampler.samples_per_step} images "
        f"({args.batch_size} x {args.gradient_accumulation_steps} accumulated x {accelerator.num_processes} processes)"
    )


def loop(training: Training) -> None:
    """All steps that are left. Raises Stopped between two of them, or in an evaluation, when the run is told to."""
    args, accelerator, meter = training.args, training.accelerator, training.state.meter
    pin_memory = accelerator.device.type == "cuda"
    batches: Iterator[dict] = iter(train_loader(training.train_set, training.sampler, args.num_workers, pin_memory))
    bar = tqdm(total=training.max_steps, initial=training.step, disable=None if accelerator.is_main_process else True)
    report(training)  # what a run that broke off while it evaluated still owes
    training.model.train()
    meter.restart_clock()
    while not training.is_last_step:
        # All micro-batches of a step come first: the loss of each is divided by the weight of all, on all ranks.
        with meter.waiting():
            micro_batches = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        if training.step == 0:
            training.reporter.show_batch(micro_batches[0], training.train_set.build.tokenizer)
        weight = sum(batch["weights"].sum().item() for batch in micro_batches)
        total_weight, stopping = sum_over_ranks(accelerator, weight, float(bool(training.stop)))
        if stopping:
            raise Stopped
        grad_norm = train_step(training, micro_batches, max(total_weight, 1e-9))
        bar.update()
        if training.is_due(args.log_every) or training.is_last_step:
            log(training, grad_norm, bar)
        with meter.paused():
            report(training)
            if training.is_due(args.ckpt_every) and not training.is_last_step:
                save(training)
    bar.close()


def train_step(training: Training, micro_batches: list[dict], total_weight: float) -> torch.Tensor:
    """One optimizer step; returns the norm of its gradient.

    The loss is the sum over all tokens of the step, of all micro-batches and ranks, divided by their `total_weight`:
    how the step is split changes nothing. A step whose loss or gradient is not finite leaves the model as it was, on
    all ranks; too many of them in a row raise NonFiniteLoss.
    """
    args, accelerator, state = training.args, training.accelerator, training.state
    # Dropout is keyed like the data, not remembered.
    key = np.random.SeedSequence((args.seed, training.step, accelerator.process_index)).generate_state(1)
    torch.manual_seed(int(key[0]))
    buffers = [buffer.clone() for buffer in training.detector.buffers()]
    loss, suspects, statistics = torch.zeros((), device=accelerator.device), [], []
    for batch in micro_batches:
        pixel_values, input_ids, labels, weights = (
            batch[name].to(accelerator.device, non_blocking=True)
            for name in ("pixel_values", "input_ids", "labels", "weights")
        )
        with accelerator.accumulate(training.model):
            output = training.model(pixel_values, input_ids, labels, weights, normalizer=total_weight)
            # DDP averages over ranks and backward() divides by the accumulation: both are undone here.
            accelerator.backward(output.loss * accelerator.num_processes * args.gradient_accumulation_steps)
        loss += output.loss.detach()
        if not torch.isfinite(output.loss):
            suspects += batch["image_id"].tolist()
        statistics.append(token_statistics(output.logits, output.token_losses, labels, weights))
    # Clipping to infinity measures the norm and changes nothing.
    norm = accelerator.clip_grad_norm_(training.model.parameters(), args.max_grad_norm or math.inf)
    # A gradient that overflowed in fp16 is the loss scaler's business.
    bad_gradient = not torch.isfinite(norm) and accelerator.scaler is None
    if sum(sum_over_ranks(accelerator, float(not torch.isfinite(loss)), float(bad_gradient))):
        everything = [image_id for batch in micro_batches for image_id in batch["image_id"].tolist()]
        skip_step(training, buffers, gather_object(suspects) or gather_object(everything))
    else:
        state.skipped_in_a_row = 0
        state.meter.add(sum(statistics), sum(len(batch["image_id"]) for batch in micro_batches))
        state.optimizer.step()
        if state.average is not None:
            state.average.update_parameters(training.detector)
    state.optimizer.zero_grad()
    state.scheduler.step()
    state.step += 1
    return norm


def skip_step(training: Training, buffers: list[torch.Tensor], image_ids: list[int]) -> None:
    """Puts back what the forward pass changed, and counts."""
    state = training.state
    for buffer, before in zip(training.detector.buffers(), buffers, strict=True):
        buffer.copy_(before)
    if training.accelerator.scaler is not None:
        training.accelerator.scaler.update()  # the gradients were unscaled: it would not do so again
    state.skipped += 1
    state.skipped_in_a_row += 1
    fault = f"loss or gradient of step {training.step + 1} is not finite; image ids: {image_ids}"
    if state.skipped_in_a_row > training.args.max_skipped_steps:
        raise NonFiniteLoss(f"{fault}; stopped after {state.skipped_in_a_row} such steps in a row")
    training.folder.log(f"{fault}; the step was not taken")


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    return accelerator.reduce(torch.tensor(values, device=accelerator.device), "sum").tolist()


def log(training: Training, grad_norm: torch.Tensor, bar: tqdm) -> None:
    """A row of metrics.jsonl, and a line where there is no terminal for the progress bar."""
    accelerator, meter = training.accelerator, training.state.meter
    row = describe(accelerator.reduce(meter.statistics, "sum")) | {
        "train/lr": training.state.scheduler.get_last_lr()[-1],
        "train/grad_norm": float(grad_norm),
        "train/skipped_steps": training.state.skipped,
    }
    row |= meter.rates(accelerator.num_processes, training.train_set.build.length)
    meter.restart()
    training.folder.metrics(training.step, row)
    training.folder.status("running", training.step)
    bar.set_postfix(loss=f"{row['train/loss']:.3f}", acc_class=f"{row['train/acc_class']:.2f}")
    if bar.disable:
        training.folder.log(
            f"step {training.step}/{training.max_steps}  loss {row['train/loss']:.4f}  "
            f"coord {row['train/loss_coord']:.4f}  class {row['train/loss_class']:.4f}  "
            f"{row['perf/images_per_s']:.1f} images/s"
        )


def report(training: Training) -> None:
    """The evaluation and the picture due at this step, unless they are done. The best detector goes to best/."""
    state, reporter = training.state, training.reporter
    if state.reported == training.step:
        return
    if training.is_due(training.args.sample_every):
        reporter.sample(training.detector, training.step)
    if training.is_due(training.args.eval_every) or training.is_last_step:
        for name, detector in training.detectors.items():
            metrics = reporter.evaluate(detector, training.step, name)
            if metrics is None:  # not the main process
                continue
            if training.is_last_step:
                training.folder.log(metrics_table(metrics))
            if metrics["AP"] > state.best_ap and keep_detector(training, "best", detector):
                state.best_ap = metrics["AP"]
    state.reported = training.step


def write_detector(detector: Pix2SeqForObjectDetection, args: Arguments, path: Path) -> None:
    """A from_pretrained folder, and the flags it was trained with: evaluate.py takes its defaults from them."""
    detector.save_pretrained(path)
    Pix2SeqImageProcessor.for_detector(detector.config).save_pretrained(path)
    write_flags(args, path)


def save(training: Training) -> bool:
    """A checkpoint to resume from. Every rank calls this; the main one writes. A full disk ends no run: training goes
    on with the last good checkpoint, and the next one is tried again. Returns whether it was written."""
    accelerator, folder = training.accelerator, training.folder
    statistics = accelerator.reduce(training.state.meter.statistics, "sum")

    def write(path: Path) -> None:
        write_detector(training.detector, training.args, path)
        training.state.save(path, statistics)

    written = True
    if accelerator.is_main_process:
        try:
            checkpoint.save(folder.checkpoints, training.step, write, training.args.keep_last)
        except DISK_ERRORS as error:
            folder.log(f"the checkpoint of step {training.step} could not be written ({error})")
            written = False
    return sum_over_ranks(training.accelerator, float(not written))[0] == 0


def keep_detector(training: Training, name: str, detector: Pix2SeqForObjectDetection) -> bool:
    """best/ or final/, by the main process. Returns whether it was written."""
    try:
        checkpoint.commit(training.folder.path / name, partial(write_detector, detector, training.args))
    except DISK_ERRORS as error:
        training.folder.log(f"{name}/ could not be written ({error})")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(parse(Arguments)))
