"""Trains a detector: `accelerate launch train.py --root /path/to/coco`, or `--config configs/overfit.yaml`.

From image to loss in five hops: `loop` here -> `TrainDataset.__getitem__` (data/datasets.py) -> `TrainTransform`
(transforms.py) and `SequenceBuilder` (sequence.py) -> `train_step` here -> `Pix2SeqForObjectDetection.forward`
(models/modeling_pix2seq.py). `--help` lists the flags; run_folder.py says what a run leaves behind.
"""

import math
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType, broadcast_object_list, gather_object, set_seed
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, to_yaml
from pix2seq.arguments import TrainArguments
from pix2seq.colors import apply_color_ops
from pix2seq.data import train_loader
from pix2seq.data.commands import check_data
from pix2seq.data.unreadable import TooManyUnreadable
from pix2seq.errors import Stopped, UserError
from pix2seq.evaluation.coco_metrics import metrics_table
from pix2seq.training.launcher import rejoin_process_group, restarts
from pix2seq.training.metrics import describe, token_statistics
from pix2seq.training.preemption import StopRequest
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.saving import export_model, save
from pix2seq.training.setup import TrainContext, build
from pix2seq.training.sharding import gather_full_tensor


class NotSaved(RuntimeError):
    """A run ends without the checkpoint it should leave behind."""


class NonFiniteLoss(RuntimeError):
    """Too many steps in a row whose loss or gradient is NaN or infinite. None of them was taken."""


def run_training(args: TrainArguments) -> int:
    """One training run; returns the exit code. The user's mistakes are told in one line, and how a run that has begun
    ended is noted in its status.json, unless the fault was on another process than the main one."""
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    try:
        if args.check_data:
            return check_data(args) if rank == 0 else 0
        training = setup(args, stop)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # all processes of a node find the same fault
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    try:
        return run(training)
    except (UserError, NonFiniteLoss, NotSaved) as error:
        print(f"train.py: error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        training.folder.status("failed", training.step, str(error))
        if not isinstance(error, UserError):
            return 1
        # All processes are here, or there is only one; others would have gone on and could not be asked.
        if (isinstance(error, TooManyUnreadable) or training.accelerator.num_processes == 1) and save(training):
            print(f"train.py: saved at step {training.step}; --resume auto continues from there", file=sys.stderr)
        return 2
    except BaseException as error:
        training.folder.status("failed", training.step, repr(error))
        raise


def run(training: TrainContext) -> int:
    """From the first step to what is left behind; returns the exit code."""
    accelerator, folder, stop = training.accelerator, training.folder, training.stop
    try:
        loop(training)
        saved = save(training)
    except Stopped:
        if not save(training):
            raise NotSaved(f"{stop.name}: the checkpoint of step {training.step} could not be written") from None
        folder.log(f"{stop.name}: saved at step {training.step}; the same command with --resume auto continues")
        folder.status("preempted", training.step, stop.name)
        accelerator.end_training()
        return stop.exit_code
    detector = list(training.detectors().values())[-1]  # the average, if there is one
    if accelerator.is_main_process:
        saved = export_model(training, "final", detector) and saved
    accelerator.wait_for_everyone()
    if not saved:
        raise NotSaved(f"{folder.path}: the last checkpoint or final/ could not be written")
    folder.log(f"finished: {folder.path}; best AP {training.state.best_ap:.4f} in best/, the last in final/")
    folder.status("finished", training.step)
    accelerator.end_training()
    return 0


def setup(args: TrainArguments, stop: StopRequest) -> TrainContext:
    """Everything before the first step. Raises UserError for what the user has to mend."""
    accelerator = make_accelerator(args)
    # What the launcher chose is part of the run: evaluate.py and a resumed run go by it.
    args.mixed_precision = accelerator.mixed_precision
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP: only version 2 is supported (fsdp_version: 2 in Accelerate's config)")
    if accelerator.is_fsdp2 and args.ema_decay:
        raise UserError("--ema_decay: is not kept of weights that FSDP shards; leave it out, or train with DDP")
    transformers_logging.disable_progress_bar()
    set_seed(args.seed, deterministic=args.deterministic)
    folder = RunFolder(args.output_dir, accelerator.is_main_process)
    if args.resume is None and restarted(folder):
        args.resume = "auto"
    training = build(args, accelerator, folder, stop)
    log_summary(training)
    return training


def restarted(folder: RunFolder) -> bool:
    """Whether torchelastic, after a crash, has started again what this very launch began in the folder."""
    if restarts() == 0:
        return False
    return broadcast_object_list([folder.is_of_this_launch()])[0]  # the main process's launcher is the one noted


def make_accelerator(args: TrainArguments) -> Accelerator:
    known = [kind.value for kind in LoggerType if kind is not LoggerType.ALL]
    installed = [str(kind) for kind in get_available_trackers()]
    for name in args.report_to:  # Accelerate leaves out trackers that are not installed without a word
        if name not in known:
            raise UserError(f"--report_to {name}: must be none or among {', '.join(known)}")
        if name not in installed:
            raise UserError(f"--report_to {name}: is not installed (pip install {name})")
    rejoin_process_group()
    try:
        accelerator = Accelerator(
            # Without it, processes on a CPU do not find each other. Apple's GPUs have no float64.
            cpu=not torch.cuda.is_available(),
            mixed_precision=args.mixed_precision,
            dynamo_backend="inductor" if args.compile else None,
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


def log_summary(training: TrainContext) -> None:
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
        folder.trackers.start(accelerator, args.project_name, flags, resumed=training.step > 0)
    except Exception as error:  # each tracker has errors of its own
        fault = UserError(f"--report_to {' '.join(args.report_to)}: cannot be started ({error})")
        folder.status("failed", training.step, str(fault))
        raise fault from None
    for name, data in (("train", training.train_set), ("val", training.evaluator.val_set)):
        for line in data.annotations.summary(args.max_objects):
            folder.log(f"{name + ':':6} {line}")
    for line in sorted(training.unreadable.lines):
        folder.log(f"replaced by another image: {line}")
    folder.log(
        f"{sum(p.numel() for p in training.model.parameters()) / 1e6:.1f} M parameters on {accelerator.device}; "
        f"steps {training.step} to {training.max_steps} of {training.sampler.samples_per_step} images "
        f"({args.batch_size} x {args.gradient_accumulation_steps} accumulated x {accelerator.num_processes} processes)"
    )


def loop(training: TrainContext) -> None:
    """All steps that are left. Raises Stopped between two of them, or in an evaluation, when the run is told to."""
    args, accelerator, meter = training.args, training.accelerator, training.state.meter
    # DDP's word for the gradients of 1x1 convolutions: strides of dimensions of size 1 differ, the memory does not.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
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
            training.evaluator.log_first_batch(micro_batches[0], training.train_set.sequence_builder.tokenizer)
        grad_norm, stopping = train_step(training, micro_batches)
        bar.update()
        if training.is_due(args.log_every) or training.is_last_step:
            log(training, grad_norm, bar)
        training.unreadable.enforce()
        with meter.paused():
            report(training)
            if stopping and not training.is_last_step:
                raise Stopped
            if training.is_due(args.ckpt_every) and not training.is_last_step:
                save(training)
    bar.close()


def train_step(training: TrainContext, micro_batches: list[dict]) -> tuple[torch.Tensor, bool]:
    """One optimizer step; returns the norm of its gradient, and whether any process has been told to stop.

    The loss is the sum over all tokens of the step, of all micro-batches and ranks, divided by their total weight:
    how the step is split changes nothing. A step whose loss or gradient is not finite leaves the model as it was, on
    all ranks; too many of them in a row raise NonFiniteLoss.
    """
    args, accelerator, state, device = training.args, training.accelerator, training.state, training.accelerator.device
    unreadable = training.unreadable.new(micro_batches)
    # Dropout is keyed like the data, not remembered.
    key = np.random.SeedSequence((args.seed, training.step, accelerator.process_index)).generate_state(1)
    torch.manual_seed(int(key[0]))
    buffers = [buffer.clone() for buffer in training.unwrapped.buffers()]
    weight = sum(batch["token_weights"].sum() for batch in micro_batches).to(device, non_blocking=True)
    total_weight = accelerator.reduce(weight, "sum").clamp(min=1e-9)
    losses, statistics, tokenizer = [], [], training.train_set.sequence_builder.tokenizer
    for batch in micro_batches:
        batch = batch | {"loss_positions": batch["token_weights"].flatten().nonzero()[:, 0]}
        pixel_values, size, input_ids, labels, token_weights, loss_positions = (
            batch[name].to(device, non_blocking=True)
            for name in ("pixel_values", "size", "input_ids", "labels", "token_weights", "loss_positions")
        )
        if "color_ops" in batch:
            pixel_values = apply_color_ops(pixel_values, batch["size"], batch["color_ops"])
        with accelerator.accumulate(training.model):
            output = training.model(
                pixel_values,
                input_ids=input_ids,
                labels=labels,
                token_weights=token_weights,
                num_items_in_batch=1.0,
                loss_positions=loss_positions,
            )
            loss = output.loss / total_weight
            # DDP averages over ranks and backward() divides by the accumulation: both are undone here.
            accelerator.backward(loss * accelerator.num_processes * args.gradient_accumulation_steps)
        losses.append(loss.detach())
        words = (output.logits, output.token_losses, labels, token_weights, loss_positions)
        statistics.append(token_statistics(*words, tokenizer, valid_fraction=size / pixel_values.shape[-1]))
    # Clipping to infinity measures the norm and changes nothing.
    norm = gather_full_tensor(accelerator.clip_grad_norm_(training.model.parameters(), args.max_grad_norm or math.inf))
    # The one place where a step waits for the device, and for the other ranks.
    flags = torch.tensor([bool(training.stop), bool(unreadable)]).to(device)
    summary_line = torch.cat([torch.stack([~torch.stack(losses).isfinite().all(), ~norm.isfinite()]), flags])
    bad_loss, bad_gradient, stopping, replaced = accelerator.reduce(summary_line.float(), "sum").tolist()
    if bad_loss or (bad_gradient and accelerator.scaler is None):
        skip_step(training, buffers, micro_batches, losses)
    else:
        state.meter.add(sum(statistics), sum(len(batch["image_id"]) for batch in micro_batches))
        state.optimizer.step()
        if bad_gradient:  # overflowed in fp16: the loss scaler has left the step out, and scales less from now on
            state.skipped += 1
            if accelerator.scaler.get_scale() < 1:
                fault = "is not finite however small the loss is scaled"
                raise NonFiniteLoss(f"the gradient of step {training.step + 1} {fault}")
        else:
            state.skipped_in_a_row = 0
            if state.average is not None:
                state.average.update_parameters(training.unwrapped)
    state.optimizer.zero_grad()
    state.scheduler.step()
    state.step += 1
    if replaced:
        note_unreadable(training, unreadable)
    return norm, stopping > 0


def skip_step(
    training: TrainContext, buffers: list[torch.Tensor], micro_batches: list[dict], losses: list[torch.Tensor]
) -> None:
    """Puts back what the forward pass changed, counts, and names the images."""
    state = training.state
    for buffer, before in zip(training.unwrapped.buffers(), buffers, strict=True):
        buffer.copy_(before)
    if training.accelerator.scaler is not None:
        training.accelerator.scaler.update()  # the gradients were unscaled: it would not do so again
    state.skipped += 1
    state.skipped_in_a_row += 1
    ids = [batch["image_id"].tolist() for batch in micro_batches]
    suspects = [batch for batch, loss in zip(ids, losses, strict=True) if not loss.isfinite()]
    everyones = gather_object([(sum(suspects, []), sum(ids, []))])
    named = sum((suspects for suspects, _ in everyones), []) or sum((ids for _, ids in everyones), [])
    fault = f"loss or gradient of step {training.step + 1} is not finite; image ids: {named}"
    if state.skipped_in_a_row > training.args.max_skipped_steps:
        raise NonFiniteLoss(f"{fault}; stopped after {state.skipped_in_a_row} such steps in a row")
    training.folder.log(f"{fault}; the step was not taken")


def note_unreadable(training: TrainContext, lines: set[str]) -> None:
    """Names the images that could not be read and were replaced. All ranks come to know of all of them."""
    everyones = set().union(*gather_object([lines])) - training.unreadable.lines
    for line in sorted(everyones):
        training.folder.log(f"replaced by another image: {line}")
    training.unreadable.lines |= everyones


def log(training: TrainContext, grad_norm: torch.Tensor, bar: tqdm) -> None:
    """A row of metrics.jsonl, and a line where there is no terminal for the progress bar."""
    accelerator, meter = training.accelerator, training.state.meter
    row = describe(accelerator.reduce(meter.statistics, "sum")) | {
        "train/lr": training.state.scheduler.get_last_lr()[-1],
        "train/grad_norm": float(grad_norm),
        "train/skipped_steps": training.state.skipped,
        "train/unreadable_images": len(training.unreadable.lines),
    }
    row |= meter.rates(accelerator.num_processes, training.train_set.sequence_builder.length)
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


def report(training: TrainContext) -> None:
    """The evaluation and the picture due at this step, unless they are done. The best detector goes to best/."""
    state, evaluator = training.state, training.evaluator
    if state.reported == training.step:
        return
    if training.is_due(training.args.sample_every):
        evaluator.sample(training.detectors()[""], training.step)
    if training.is_due(training.args.eval_every) or training.is_last_step:
        for name, detector in training.detectors().items():
            metrics = evaluator.evaluate(detector, training.step, name)
            if metrics is None:  # not the main process
                continue
            if training.is_last_step:
                training.folder.log(metrics_table(metrics))
            if metrics["AP"] > state.best_ap and export_model(training, "best", detector):
                state.best_ap = metrics["AP"]
    state.reported = training.step


def main(argv: list[str] | None = None, program: str = "train.py") -> int:
    """Parses the command line and trains; returns the exit code."""
    return run_training(parse(TrainArguments, argv, program))


if __name__ == "__main__":
    sys.exit(main())
