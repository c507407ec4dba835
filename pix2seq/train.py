"""Trains a model: `accelerate launch train.py --root /path/to/coco`, or `--config configs/overfit.yaml`.

From an image to the loss: `TrainDataset` (data/datasets.py) reads and augments the image, `SequenceBuilder`
(sequence.py) turns its objects into tokens, and `train_step` below passes both to `Pix2SeqForObjectDetection`
(models/modeling_pix2seq.py), which returns the loss. `--help` lists the arguments.
"""

import math
import os
import sys
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.color_augmentation import apply_color_ops
from pix2seq.cpu_memory import reuse_freed_memory
from pix2seq.data import train_loader
from pix2seq.data.commands import check_data
from pix2seq.data.unreadable import TooManyUnreadableError
from pix2seq.errors import Stopped, UserError
from pix2seq.evaluation.coco_metrics import metrics_table
from pix2seq.training.checkpoint import export_model, save
from pix2seq.training.context import TrainContext
from pix2seq.training.distributed import full_tensor, make_accelerator, restart_count
from pix2seq.training.hard_negatives import images_to_search
from pix2seq.training.metrics import compute_means, token_statistics
from pix2seq.training.preemption import StopRequest
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.setup import build_context, create_run_folder, log_summary


class SaveError(RuntimeError):
    """The last checkpoint or the final model could not be written."""


class NonFiniteLossError(RuntimeError):
    """The loss or gradient of too many steps in a row was NaN or infinite. None of these steps was taken."""


def main(argv: list[str] | None = None, program: str = "train.py") -> int:
    """Parses the command line and trains; returns the exit code."""
    return run_training(parse(TrainArguments, argv, program), program)


def run_training(args: TrainArguments, program: str = "train.py") -> int:
    """Trains, prints a `UserError` as one line, and records in status.json how the run ended.

    Args:
        args: arguments of the run.
        program: name of the program in messages.

    Returns:
        Exit code: 0 (finished), 1 (error), 2 (an argument or file is wrong), 75 (stopped by a signal after a save) or
        130 (stopped by Ctrl-C after a save).
    """
    stop, rank = StopRequest(), int(os.environ.get("RANK", "0"))
    try:
        if args.check_data:
            return check_data(args) if rank == 0 else 0
        context = setup(args, stop)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # all processes of a node raise the same error
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    try:
        return train(context)
    except (UserError, NonFiniteLossError, SaveError) as error:
        print(f"{program}: error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        context.folder.status("failed", context.step, str(error))
        if not isinstance(error, UserError):
            return 1
        # All processes take part in a save. Only TooManyUnreadableError is raised by all of them.
        if (isinstance(error, TooManyUnreadableError) or context.accelerator.num_processes == 1) and save(context):
            print(f"{program}: saved at step {context.step}; --resume auto continues from there", file=sys.stderr)
        return 2
    except BaseException as error:
        context.folder.status("failed", context.step, repr(error))
        raise


def setup(args: TrainArguments, stop: StopRequest) -> TrainContext:
    """Does everything before the first step; raises UserError if an argument or file is wrong."""
    accelerator = make_accelerator(
        mixed_precision=args.mixed_precision,
        compile=args.compile,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        report_to=args.report_to,
        output_dir=args.output_dir,
    )
    if accelerator.device.type == "cpu":
        reuse_freed_memory()
    args.mixed_precision = accelerator.mixed_precision  # the launcher's; evaluate.py and a resumed run repeat it
    if accelerator.is_fsdp2 and args.ema_decay:
        raise UserError("--ema_decay: is not supported with FSDP; omit it, or train with DDP")
    transformers_logging.disable_progress_bar()
    set_seed(args.seed, deterministic=args.deterministic)
    folder = RunFolder(args.output_dir, accelerator.is_main_process)
    # A process that torchelastic restarted after a crash resumes the run that its launcher started.
    if args.resume is None and restart_count() and broadcast_object_list([folder.started_by_this_launch()])[0]:
        args.resume = "auto"
    context = build_context(args, accelerator=accelerator, folder=folder, stop=stop)
    create_run_folder(context)
    log_summary(context)
    return context


def train(context: TrainContext) -> int:
    """Takes all remaining steps, saves, and returns the exit code."""
    folder, stop = context.folder, context.stop
    try:
        train_loop(context)
        saved = save(context)
    except Stopped:
        if not save(context):
            raise SaveError(f"{stop.name}: the checkpoint of step {context.step} could not be written") from None
        folder.log(f"{stop.name}: saved at step {context.step}; the same command with --resume auto continues")
        folder.status("preempted", context.step, stop.name)
        context.accelerator.end_training()
        return stop.exit_code
    final_model = list(context.models().values())[-1]  # the moving average, if there is one
    if context.accelerator.is_main_process:
        saved = export_model(context, "final", final_model) and saved
    context.accelerator.wait_for_everyone()
    if not saved:
        raise SaveError(f"{folder.path}: the last checkpoint or final/ could not be written")
    if context.early_stop_reason:
        folder.log(f"stopped at step {context.step} of {context.max_steps}: {context.early_stop_reason}")
    folder.log(f"finished: {folder.path}; best AP {context.state.best_ap:.4f} in best/, last model in final/")
    folder.status("finished", context.step, context.early_stop_reason)
    context.accelerator.end_training()
    return 0


def train_loop(context: TrainContext) -> None:
    """Takes all remaining steps. Raises Stopped between two steps or during an evaluation after a stop signal."""
    args, accelerator, meter = context.args, context.accelerator, context.state.meter
    # DDP warns about the gradients of 1x1 convolutions, whose strides differ only in dimensions of size 1.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    bar = tqdm(total=context.max_steps, initial=context.step, disable=None if accelerator.is_main_process else True)
    evaluate_if_due(context)  # repeats an evaluation that was interrupted
    search_hard_negatives_if_due(context)
    batches = load_batches(context)
    context.model.train()
    meter.restart_clock()
    while not context.is_finished:
        # The loss of a micro-batch is divided by the weight of all micro-batches, so all are loaded first.
        with meter.waiting():
            micro_batches = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        if context.step == 0:
            context.evaluator.log_first_batch(micro_batches[0], context.tokenizer)
        grad_norm, stopping = train_step(context, micro_batches)
        bar.update()
        if context.is_due(args.log_every) or context.is_finished:
            log_metrics(context, grad_norm, bar)
        context.unreadable.check_limit()
        with meter.paused():
            evaluate_if_due(context)
            if search_hard_negatives_if_due(context):
                batches = load_batches(context)
            if stopping and not context.is_finished:
                raise Stopped
            if context.is_due(args.ckpt_every) and not context.is_finished:
                save(context)
    bar.close()


def load_batches(context: TrainContext) -> Iterator[dict]:
    """Loads the training batches from the current step on."""
    context.sampler.start_step = context.step
    pin_memory = context.accelerator.device.type == "cuda"
    return iter(train_loader(context.train_set, context.sampler, context.args.num_workers, pin_memory))


def train_step(context: TrainContext, micro_batches: list[dict]) -> tuple[torch.Tensor, bool]:
    """Takes one optimizer step.

    The loss is the sum of all token losses of the step, over micro-batches and processes, divided by the sum of their
    weights, so it does not depend on how the step is split. If the loss or gradient is not finite, no parameter
    changes on any process; buffers are restored too, unless the fp16 loss scaler skips the step.

    Args:
        context: the run.
        micro_batches: batches of this process, one for each accumulation step.

    Returns:
        The norm of the gradient, and whether any process received a stop signal.

    Raises:
        NonFiniteLossError: the loss or gradient of too many steps in a row was not finite.
    """
    args, accelerator, state = context.args, context.accelerator, context.state
    unreadable = context.unreadable.find_new(micro_batches)
    # Dropout depends on (seed, step, process) only, so a resumed run repeats it.
    seed = np.random.SeedSequence((args.seed, context.step, accelerator.process_index)).generate_state(1)
    torch.manual_seed(int(seed[0]))
    buffers = [buffer.clone() for buffer in context.unwrapped_model.buffers()]
    losses, statistics = forward_backward(context, micro_batches)
    # Clipping to infinity only measures the norm.
    max_grad_norm = args.max_grad_norm or math.inf
    grad_norm = full_tensor(accelerator.clip_grad_norm_(context.model.parameters(), max_grad_norm))
    # A single reduction, because here a step waits for the device and for the other processes.
    not_finite = torch.stack([~torch.stack(losses).isfinite().all(), ~grad_norm.isfinite()])
    events = torch.tensor([bool(context.stop), bool(unreadable)]).to(accelerator.device)
    flags = accelerator.reduce(torch.cat([not_finite, events]).float(), "sum").tolist()
    bad_loss, bad_gradient, stopping, replaced = (flag > 0 for flag in flags)
    if bad_loss or (bad_gradient and accelerator.scaler is None):
        skip_step(context, buffers, micro_batches, losses)
    else:
        state.meter.add(statistics, sum(len(batch["image_id"]) for batch in micro_batches))
        state.optimizer.step()
        if bad_gradient:  # the fp16 loss scaler has skipped the step and reduced its scale
            state.num_skipped += 1
            if accelerator.scaler.get_scale() < 1:
                raise NonFiniteLossError(
                    f"the gradient of step {context.step + 1} is not finite at any scale of the loss"
                )
        else:
            state.num_consecutive_skipped = 0
            if state.ema_model is not None:
                state.ema_model.update_parameters(context.unwrapped_model)
    state.optimizer.zero_grad()
    state.scheduler.step()
    state.step += 1
    if replaced:
        log_unreadable(context, unreadable)
    return grad_norm, stopping


def forward_backward(context: TrainContext, micro_batches: list[dict]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Accumulates the gradients of a step.

    Returns:
        The loss of each micro-batch, and the sum of their `token_statistics`.
    """
    accelerator, losses, statistics = context.accelerator, [], []
    weight = sum(batch["token_weights"].sum() for batch in micro_batches).to(accelerator.device, non_blocking=True)
    total_weight = accelerator.reduce(weight, "sum").clamp(min=1e-9)
    for batch in micro_batches:
        batch = batch | {"loss_positions": batch["token_weights"].flatten().nonzero()[:, 0]}
        pixel_values, size, input_ids, labels, token_weights, loss_positions = (
            batch[name].to(accelerator.device, non_blocking=True)
            for name in ("pixel_values", "size", "input_ids", "labels", "token_weights", "loss_positions")
        )
        if "color_ops" in batch:
            pixel_values = apply_color_ops(pixel_values, batch["size"], batch["color_ops"])
        with accelerator.accumulate(context.model):
            output = context.model(
                pixel_values,
                input_ids=input_ids,
                labels=labels,
                token_weights=token_weights,
                num_items_in_batch=1.0,  # the sum is divided below, by the weight of all processes
                loss_positions=loss_positions,
            )
            loss = output.loss / total_weight
            # DDP averages over processes and backward() divides by the accumulation steps; undo both.
            accelerator.backward(loss * accelerator.num_processes * context.args.gradient_accumulation_steps)
        losses.append(loss.detach())
        statistics.append(
            token_statistics(
                logits=output.logits,
                token_losses=output.token_losses,
                labels=labels,
                token_weights=token_weights,
                loss_positions=loss_positions,
                tokenizer=context.tokenizer,
                valid_fraction=size / pixel_values.shape[-1],
            )
        )
    return losses, sum(statistics[1:], start=statistics[0])


def skip_step(
    context: TrainContext, buffers: list[torch.Tensor], micro_batches: list[dict], losses: list[torch.Tensor]
) -> None:
    """Restores the buffers that the forward pass changed, and logs the ids of the images."""
    state = context.state
    for buffer, before in zip(context.unwrapped_model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    if context.accelerator.scaler is not None:
        context.accelerator.scaler.update()  # clipping unscaled the gradients; without an update it raises next time
    state.num_skipped += 1
    state.num_consecutive_skipped += 1
    images = [
        (image_id, not loss.isfinite().item())
        for batch, loss in zip(micro_batches, losses, strict=True)
        for image_id in batch["image_id"].tolist()
    ]
    images = gather_object(images)
    suspects = [image_id for image_id, bad_loss in images if bad_loss] or [image_id for image_id, _ in images]
    message = f"loss or gradient of step {context.step + 1} is not finite; image ids: {suspects}"
    if state.num_consecutive_skipped > context.args.max_skipped_steps:
        raise NonFiniteLossError(f"{message}; stopped after {state.num_consecutive_skipped} such steps in a row")
    context.folder.log(f"{message}; the step is skipped")


def log_unreadable(context: TrainContext, lines: set[str]) -> None:
    """Logs the images that could not be read on any process, and remembers them on all processes."""
    new_lines = set().union(*gather_object([lines])) - context.unreadable.lines
    for line in sorted(new_lines):
        context.folder.log(f"replaced by another image: {line}")
    context.unreadable.lines |= new_lines


def log_metrics(context: TrainContext, grad_norm: torch.Tensor, bar: tqdm) -> None:
    """Writes a row of metrics.jsonl, and a line of the log if there is no progress bar."""
    accelerator, meter = context.accelerator, context.state.meter
    row = compute_means(accelerator.reduce(meter.statistics, "sum")) | {
        "train/lr": context.state.scheduler.get_last_lr()[-1],
        "train/grad_norm": float(grad_norm),
        "train/skipped_steps": context.state.num_skipped,
        "train/unreadable_images": len(context.unreadable.lines),
    }
    row |= meter.rates(accelerator.num_processes, context.train_set.sequence_builder.length)
    meter.restart()
    context.folder.metrics(context.step, row)
    context.folder.status("running", context.step)
    if hint := context.plateau.update(row | {"step": context.step}):
        context.folder.log(hint)
    bar.set_postfix(loss=f"{row['train/loss']:.3f}", acc_class=f"{row['train/acc_class']:.2f}")
    if bar.disable:
        context.folder.log(
            f"step {context.step}/{context.max_steps}  loss {row['train/loss']:.4f}  "
            f"coord {row['train/loss_coord']:.4f}  class {row['train/loss_class']:.4f}  "
            f"{row['perf/images_per_s']:.1f} images/s"
        )


def evaluate_if_due(context: TrainContext) -> None:
    """Draws samples and evaluates if that is due at this step and not done yet. Exports the best model to best/."""
    args, state, evaluator = context.args, context.state, context.evaluator
    if state.last_evaluated_step == context.step:
        return
    if context.is_due(args.sample_every):
        evaluator.sample(context.models()[""], context.step)
    if context.is_due(args.eval_every) or context.is_finished:
        tables = []
        for name, model in context.models().items():
            metrics = evaluator.evaluate(model, context.step, name)
            if metrics is None:  # not the main process
                continue
            tables.append(metrics_table(metrics))
            if metrics["AP"] > state.best_ap:
                state.best_step = context.step
                if export_model(context, "best", model):
                    state.best_ap = metrics["AP"]
        context.count_evaluation()
        if context.is_finished:
            for table in tables:
                context.folder.log(table)
    state.last_evaluated_step = context.step


def search_hard_negatives_if_due(context: TrainContext) -> bool:
    """Searches false detections in training images, if that is due at this step and not done yet.

    Returns:
        Whether `context.train_set.hard_negatives` has changed, so that examples must be loaded again.
    """
    state, annotations = context.state, context.train_set.annotations
    is_due = context.is_due(context.args.hard_negative_every) and not context.is_finished
    if not is_due or state.last_searched_step == context.step:
        return False
    num_earlier = context.step // context.args.hard_negative_every - 1
    images = annotations.subset(images_to_search(len(annotations), num_earlier))
    found = context.evaluator.find_hard_negatives(context.models()[""], images)
    context.train_set.hard_negatives.update(found)
    state.last_searched_step = context.step
    context.folder.log(f"step {context.step}: {sum(map(len, found.values()))} hard negatives in {len(images)} images")
    return True


if __name__ == "__main__":
    sys.exit(main())
