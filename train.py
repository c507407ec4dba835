"""Trains a detector: `accelerate launch train.py --root /path/to/coco`, or `--config configs/overfit.yaml`.

From image to loss in five hops: `loop` here -> `TrainDataset.__getitem__` (data.py) -> `TrainTransform`
(transforms.py) and `SequenceBuilder` (sequence.py) -> `train_step` here -> `Pix2SeqForObjectDetection.forward`
(model.py). `--help` lists the flags; run_folder.py says what a run leaves behind.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, gather_object, set_seed
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm
from transformers import LlamaConfig, get_scheduler
from transformers.utils import logging as transformers_logging

from pix2seq import checkpoint
from pix2seq.backbone import choose_backbone
from pix2seq.coco import Annotations, Categories, DataError, Split, coco_split, load_annotations, load_ground_truth
from pix2seq.config import Arguments, parse, to_yaml
from pix2seq.data import EvalDataset, StepSampler, TrainDataset, train_loader
from pix2seq.decoding import DecodingOptions
from pix2seq.evaluation import coco_metrics, metrics_table, predict, prediction_picture
from pix2seq.metrics import describe, token_statistics
from pix2seq.model import Pix2SeqConfig, Pix2SeqForObjectDetection, parameter_groups
from pix2seq.preemption import StopRequest
from pix2seq.run_folder import RunFolder
from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import SLOTS, TOKENS_PER_OBJECT, Tokenizer
from pix2seq.transforms import EvalTransform, TrainTransform
from pix2seq.visualize import draw_examples

NUM_SAMPLES = 8  # images in every picture of examples and predictions

# Flags that may differ from the checkpoint's when a run is resumed. A dataset may have moved. A run may be made
# longer, which moves the end of its schedule. batch_size and gradient_accumulation_steps may be traded for each other
# and for processes: see `resume`. The others change nothing that a step computes.
FREE_ON_RESUME = {
    *("config", "output_dir", "project_name", "report_to", "resume", "num_workers", "keep_last"),
    *("root", "train_images", "train_json", "val_images", "val_json", "batch_size", "gradient_accumulation_steps"),
    *("num_epochs", "max_steps", "log_every", "eval_every", "sample_every", "ckpt_every", "eval_batch_size"),
}


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite. Raised before the step it belongs to is taken."""


@dataclass
class Training:
    """What a run consists of. `step` counts the optimizer steps taken; `window` holds the token statistics of those
    since the last row of metrics.jsonl."""

    args: Arguments
    accelerator: Accelerator
    folder: RunFolder
    tokenizer: Tokenizer
    train_set: TrainDataset
    val_set: EvalDataset
    truth: dict
    sampler: StepSampler
    max_steps: int
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    window: torch.Tensor
    step: int = 0
    best_ap: float = -math.inf
    watch: "Stopwatch" = field(default_factory=lambda: Stopwatch())

    @property
    def detector(self) -> Pix2SeqForObjectDetection:
        return self.accelerator.unwrap_model(self.model)

    @property
    def is_last_step(self) -> bool:
        return self.step == self.max_steps

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


@dataclass
class Stopwatch:
    """Seconds spent training and, of these, waiting for data; and the images seen, since the last row."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    images: int = 0


def load_data(args: Arguments) -> tuple[Annotations, Annotations]:
    if args.root is not None:
        train_split, val_split = coco_split(args.root, "train"), coco_split(args.root, "val")
    else:
        train_split = Split(Path(args.train_images), Path(args.train_json))
        val_split = Split(Path(args.val_images), Path(args.val_json))
    train = load_annotations(train_split)
    if not train.trainable.any():
        raise DataError(f"{train_split.json}: holds no objects to train on")
    if args.overfit:
        train = train.subset(range(min(args.overfit, len(train))))
        return train, train
    return train, load_annotations(val_split, train.categories)


def build_model(args: Arguments, tokenizer: Tokenizer, categories: Categories) -> Pix2SeqForObjectDetection:
    """A model with new weights, but for a pretrained backbone. Raises ValueError if there is no such backbone."""
    backbone = choose_backbone(args.backbone)
    decoder_config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.mlp_size,
        num_hidden_layers=args.decoder_layers,
        num_attention_heads=args.num_heads,
        max_position_embeddings=TOKENS_PER_OBJECT * args.max_objects + 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    config = Pix2SeqConfig(
        backbone_config=backbone.config,
        decoder_config=decoder_config,
        hidden_size=args.hidden_size,
        encoder_layers=args.encoder_layers,
        encoder_heads=args.num_heads,
        encoder_mlp_size=args.mlp_size,
        dropout=args.dropout,
        position_code=args.position_code,
        image_size=args.image_size,
        image_mean=backbone.image_mean,
        image_std=backbone.image_std,
        num_bins=args.num_bins,
        max_objects=args.max_objects,
        noise_objects=args.noise_objects,
        category_ids=categories.ids,
        id2label=dict(enumerate(categories.names)),
        label2id={name: label for label, name in enumerate(categories.names)},
        decoding={"top_p": args.top_p, "temperature": args.temperature},
    )
    model = Pix2SeqForObjectDetection(config)
    if backbone.pretrained is not None:
        model.backbone.load_pretrained(backbone.pretrained)
    try:
        with torch.no_grad():
            model.eval().encode(torch.zeros(1, 3, args.image_size, args.image_size, dtype=torch.uint8))
    except Exception as error:  # whatever a model that is no vision model, or of another size, raises
        raise ValueError(f"{args.backbone}: does not turn pictures into features ({error})") from None
    return model.train()


def prepare(args: Arguments, accelerator: Accelerator, folder: RunFolder) -> Training:
    """Reads the data and builds everything, from the checkpoint to resume from if there is one."""
    train_data, val_data = load_data(args)
    tokenizer = Tokenizer(len(train_data.categories.ids), args.num_bins)
    builder = SequenceBuilder(
        tokenizer,
        max_objects=args.max_objects,
        order=args.object_order,
        noise_objects=args.noise_objects,
        class_corruption=args.class_corruption,
        noise_weight=args.noise_weight,
        eos_weight=args.eos_weight,
    )
    transform = TrainTransform(args.image_size, args.scale_min, args.scale_max, args.flip, args.color_jitter)
    world, rank = accelerator.num_processes, accelerator.process_index
    sampler = StepSampler(len(train_data), args.batch_size, args.gradient_accumulation_steps, rank, world, args.seed)
    max_steps = args.max_steps or math.ceil(args.num_epochs * len(train_data) / sampler.samples_per_step)

    checkpoint_folder = find_checkpoint(args, folder)
    if checkpoint_folder is None:
        try:
            model = build_model(args, tokenizer, train_data.categories)
        except ValueError as error:
            raise DataError(f"--backbone {' '.join(str(error).split())}") from None
    else:
        model = Pix2SeqForObjectDetection.from_pretrained(checkpoint_folder)
        if Categories(tuple(model.config.category_ids), model.config.class_names) != train_data.categories:
            raise DataError(f"--resume {checkpoint_folder}: its classes are not those of {train_data.split.json}")
    lr_backbone = args.lr if args.lr_backbone is None else args.lr_backbone
    groups = parameter_groups(model, args.lr, lr_backbone, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2))
    # The scheduler is not prepared: Accelerate would step it once per process.
    scheduler = get_scheduler(args.lr_scheduler, optimizer, args.warmup_steps, max_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    training = Training(
        args=args,
        accelerator=accelerator,
        folder=folder,
        tokenizer=tokenizer,
        train_set=TrainDataset(train_data, transform, builder, args.seed),
        val_set=EvalDataset(val_data, EvalTransform(args.image_size)),
        truth=load_ground_truth(val_data.split.json, val_data.image_ids, val_data.categories),
        sampler=sampler,
        max_steps=max_steps,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        window=torch.zeros(4, len(SLOTS), dtype=torch.float64, device=accelerator.device),
    )
    if checkpoint_folder is not None:
        resume(training, checkpoint_folder)
    return training


def find_checkpoint(args: Arguments, folder: RunFolder) -> Path | None:
    """The checkpoint to resume from, verified and made with the same flags; None for a new run."""
    newest = checkpoint.latest(folder.checkpoints, folder.log)
    if args.resume is None:
        if newest is not None:
            raise DataError(
                f"--output_dir {args.output_dir}: holds checkpoints of an earlier run; "
                "continue it with --resume auto or name another folder"
            )
        return None
    if args.resume == "auto":
        found = newest
        if found is None:
            return None
    else:
        found = Path(args.resume)
        if fault := checkpoint.verify(found):
            raise DataError(f"--resume {found}: {fault}")
        for name in ("trainer.pt", "training.yaml"):
            if not (found / name).is_file():
                raise DataError(f"--resume {found}: has no {name}; name a folder under checkpoints/")
        if newest is not None and newest.name > found.name:
            raise DataError(
                f"--resume {found}: --output_dir {args.output_dir} has {newest.name}, which this would abandon; "
                "use --resume auto or name another folder"
            )
    then, now = (yaml.safe_load(text) for text in ((found / "training.yaml").read_text(), to_yaml(args)))
    changed = [name for name in then | now if name not in FREE_ON_RESUME and then.get(name) != now.get(name)]
    if changed:
        listed = ", ".join(f"--{name} {now.get(name)} (was {then.get(name)})" for name in changed)
        raise DataError(f"--resume {found}: a resumed run keeps its flags; changed: {listed}")
    return found


def resume(training: Training, checkpoint_folder: Path) -> None:
    # weights_only: nothing in the file can run code.
    state = torch.load(checkpoint_folder / "trainer.pt", map_location="cpu", weights_only=True)
    if state["samples_per_step"] != training.sampler.samples_per_step:
        raise DataError(
            f"--resume {checkpoint_folder}: batch_size x gradient_accumulation_steps x processes is "
            f"{training.sampler.samples_per_step} and was {state['samples_per_step']}"
        )
    if state["num_images"] != training.sampler.num_samples:
        raise DataError(
            f"--resume {checkpoint_folder}: the training set has {training.sampler.num_samples} images "
            f"and had {state['num_images']}"
        )
    if state["step"] > training.max_steps:
        raise DataError(f"--resume {checkpoint_folder}: it is past --max_steps {training.max_steps}")
    training.optimizer.load_state_dict(state["optimizer"])
    training.scheduler.load_state_dict(state["scheduler"])
    if training.accelerator.scaler is not None and state["scaler"]:
        training.accelerator.scaler.load_state_dict(state["scaler"])
    training.step, training.best_ap = state["step"], state["best_ap"]
    training.sampler.start_step = state["step"]
    if training.accelerator.is_main_process:
        training.window += state["window"].to(training.window.device)
    training.folder.rewind_metrics(state["step"])
    training.folder.log(f"resumed from {checkpoint_folder}")


def train_step(training: Training, micro_batches: list[dict], total_weight: float) -> torch.Tensor:
    """One optimizer step; returns the norm of its gradient. Raises NonFiniteLoss and leaves the weights alone.

    The loss is the sum over all tokens of the step, of all micro-batches and ranks, divided by their `total_weight`:
    how the step is split changes nothing.
    """
    args, accelerator = training.args, training.accelerator
    # Dropout is keyed like the data, not remembered.
    key = np.random.SeedSequence((args.seed, training.step, accelerator.process_index)).generate_state(1)
    torch.manual_seed(int(key[0]))
    loss, suspects = torch.zeros((), device=accelerator.device), []
    for batch in micro_batches:
        image_ids = batch["image_id"].tolist()
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
            suspects += image_ids
        training.window += token_statistics(output.logits, output.token_losses, labels, weights)
        training.watch.images += len(image_ids)
    if not math.isfinite(accelerator.reduce(loss, "sum").item()):
        raise NonFiniteLoss(
            f"the loss of step {training.step + 1} is not finite; the step was not taken; "
            f"image ids: {gather_object(suspects)}"
        )
    # Clipping to infinity measures the norm and changes nothing.
    norm = accelerator.clip_grad_norm_(training.model.parameters(), args.max_grad_norm or math.inf)
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.scheduler.step()
    training.step += 1
    return norm


def log(training: Training, grad_norm: torch.Tensor, progress: tqdm) -> None:
    """A row of metrics.jsonl, and the same to the trackers."""
    accelerator, watch = training.accelerator, training.watch
    seconds = time.perf_counter() - watch.started
    images = watch.images * accelerator.num_processes / seconds
    row = describe(accelerator.reduce(training.window, "sum")) | {
        "train/lr": training.scheduler.get_last_lr()[-1],
        "train/grad_norm": float(grad_norm),
        "perf/images_per_s": images,
        "perf/tokens_per_s": images * training.train_set.build.length,
        "perf/data_wait_frac": watch.waited / seconds,
    }
    if accelerator.device.type == "cuda":
        row["perf/gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
    training.folder.append_metrics({"step": training.step} | row)
    accelerator.log(row, step=training.step)
    progress.set_postfix(loss=f"{row['train/loss']:.3f}", acc_class=f"{row['train/acc_class']:.2f}")
    if progress.disable:
        training.folder.log(
            f"step {training.step}/{training.max_steps}  loss {row['train/loss']:.4f}  "
            f"coord {row['train/loss_coord']:.4f}  class {row['train/loss_class']:.4f}  {images:.1f} images/s"
        )
    training.folder.status("running", training.step)
    training.window.zero_()
    training.watch = Stopwatch()


def evaluate(training: Training) -> None:
    """COCO numbers of the validation images; the best model so far goes to best/."""
    args, folder = training.args, training.folder
    predictions = _predict(training, training.val_set)
    if not training.accelerator.is_main_process:
        return
    metrics = coco_metrics(training.truth, predictions)
    output = folder.path / "eval" / f"step_{training.step}"
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (output / "predictions.json").write_text(json.dumps(predictions))
    prediction_picture(training.val_set.annotations, predictions, NUM_SAMPLES).save(output / "predictions.png")
    row = {f"eval/{name}": value for name, value in metrics.items()}
    folder.append_metrics({"step": training.step} | row)
    training.accelerator.log(row, step=training.step)
    folder.log(f"step {training.step}: " + ", ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50", "AP75")))
    if training.is_last_step:
        folder.log(metrics_table(metrics))
    if metrics["AP"] > training.best_ap:
        training.best_ap = metrics["AP"]
        checkpoint.commit(folder.path / "best", lambda path: write_detector(training.detector, args, path))


def sample(training: Training) -> None:
    """Ground truth beside predictions, always of the same images."""
    annotations = training.val_set.annotations
    some = annotations.subset(range(min(NUM_SAMPLES, len(annotations))))
    predictions = _predict(training, EvalDataset(some, training.val_set.transform))
    if training.accelerator.is_main_process:
        _show(training, "predictions", prediction_picture(some, predictions, NUM_SAMPLES))


def _predict(training: Training, dataset: EvalDataset) -> list[dict]:
    args = training.args
    if training.accelerator.num_processes > 1:
        # Each rank's batch norms have counted a batch of their own since the last forward pass. Checkpoints hold the
        # main process's, and so must every rank that evaluates.
        for buffer in training.detector.buffers():
            torch.distributed.broadcast(buffer, src=0)
    options = DecodingOptions(args.max_objects, args.top_p, args.temperature, args.seed)
    return predict(training.detector, dataset, options, args.eval_batch_size, training.accelerator, args.num_workers)


def show_first_batch(training: Training, batch: dict) -> None:
    """What the model is about to learn, decoded back from its tokens: the cheapest detector of data bugs."""
    decoded = [training.tokenizer.decode(labels.numpy()) for labels in batch["labels"][:NUM_SAMPLES]]
    images = [to_pil_image(pixels) for pixels in batch["pixel_values"][:NUM_SAMPLES]]
    names = training.val_set.annotations.categories.names
    _show(training, "first_batch", draw_examples(images, decoded, names))


def _show(training: Training, name: str, picture) -> None:
    samples = training.folder.path / "samples"
    samples.mkdir(exist_ok=True)
    picture.save(samples / f"{name}_{training.step:08d}.png")
    for tracker in training.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({f"samples/{name}": np.asarray(picture)[None]}, step=training.step)


def write_detector(detector: Pix2SeqForObjectDetection, args: Arguments, path: Path) -> None:
    """A from_pretrained folder, and the flags it was trained with: evaluate.py takes its defaults from them."""
    detector.save_pretrained(path)
    (path / "training.yaml").write_text(to_yaml(args))


def save(training: Training) -> None:
    """A checkpoint to resume from. Every rank calls this; the main one writes."""
    accelerator = training.accelerator
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    state = {
        "step": training.step,
        "best_ap": training.best_ap,
        "samples_per_step": training.sampler.samples_per_step,
        "num_images": training.sampler.num_samples,
        "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(),
        "scaler": scaler,
        "window": accelerator.reduce(training.window, "sum").cpu(),
    }

    def write(path: Path) -> None:
        write_detector(training.detector, training.args, path)
        torch.save(state, path / "trainer.pt")

    if accelerator.is_main_process:
        checkpoint.save(training.folder.checkpoints, training.step, write, training.args.keep_last)
    accelerator.wait_for_everyone()


def check_trackers(names: list[str]) -> None:
    """Accelerate leaves out trackers that are not installed without a word."""
    known = [kind.value for kind in LoggerType if kind is not LoggerType.ALL]
    installed = [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise DataError(f"--report_to {name}: must be none or among {', '.join(known)}")
        if name not in installed:
            raise DataError(f"--report_to {name}: is not installed (pip install {name})")


def announce(training: Training) -> None:
    args, accelerator, log = training.args, training.accelerator, training.folder.log
    try:
        training.folder.describe(to_yaml(args), accelerator.device, accelerator.num_processes)
    except OSError as error:
        raise DataError(f"--output_dir {args.output_dir}: cannot be written to ({error.strerror})") from None
    training.folder.status("running", training.step)
    flags = yaml.safe_load(to_yaml(args)).items()
    # As text where a value is not a plain one: TensorBoard takes nothing else.
    plain = {name: value if isinstance(value, int | float) else str(value) for name, value in flags}
    try:
        accelerator.init_trackers(args.project_name, plain)
    except Exception as error:  # each tracker has errors of its own
        reason = " ".join(str(error).split())
        raise DataError(f"--report_to {' '.join(args.report_to)}: cannot be started ({reason})") from None
    log(f"train: {training.train_set.annotations.summary(args.max_objects)}")
    log(f"val:   {training.val_set.annotations.summary(args.max_objects)}")
    log(
        f"{sum(p.numel() for p in training.model.parameters()) / 1e6:.1f} M parameters on {accelerator.device}; "
        f"steps {training.step} to {training.max_steps} of {training.sampler.samples_per_step} images "
        f"({args.batch_size} x {args.gradient_accumulation_steps} accumulated x {accelerator.num_processes} processes)"
    )


def start(args: Arguments) -> Training:
    """Everything before the first step. Raises DataError for what the user has to mend."""
    check_trackers(args.report_to)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # without it, processes on a CPU do not find each other
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
    except ValueError as error:  # fp16 where there is no GPU, say
        raise DataError(f"--mixed_precision {args.mixed_precision}: {error}") from None
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RuntimeError(f"launched as {os.environ['WORLD_SIZE']} processes, of which Accelerate joined 1")
    # What the launcher chose is part of the run: evaluate.py and a resumed run go by it.
    args.mixed_precision = accelerator.mixed_precision
    transformers_logging.disable_progress_bar()
    set_seed(args.seed, deterministic=args.deterministic)
    training = prepare(args, accelerator, RunFolder(args.output_dir, accelerator.is_main_process))
    announce(training)
    return training


def loop(training: Training, stop: StopRequest) -> int:
    """The run itself; returns the exit code."""
    args, accelerator, folder = training.args, training.accelerator, training.folder
    pin_memory = accelerator.device.type == "cuda"
    batches: Iterator[dict] = iter(train_loader(training.train_set, training.sampler, args.num_workers, pin_memory))
    bar = tqdm(total=training.max_steps, initial=training.step, disable=None if accelerator.is_main_process else True)
    training.model.train()
    training.watch = Stopwatch()
    while training.step < training.max_steps:
        # All micro-batches of a step come first: the loss of each is divided by the weight of all, on all ranks.
        asked = time.perf_counter()
        micro_batches = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        training.watch.waited += time.perf_counter() - asked
        if training.step == 0 and accelerator.is_main_process:
            show_first_batch(training, micro_batches[0])

        local = torch.tensor([sum(b["weights"].sum().item() for b in micro_batches), float(bool(stop))])
        total_weight, stopping = accelerator.reduce(local.to(accelerator.device), "sum").tolist()
        if stopping:
            save(training)
            folder.status("preempted", training.step, stop.name)
            folder.log(f"{stop.name}: saved at step {training.step}; the same command with --resume auto continues")
            accelerator.end_training()
            return stop.exit_code
        grad_norm = train_step(training, micro_batches, max(total_weight, 1e-9))
        bar.update()

        if training.is_due(args.log_every) or training.is_last_step:
            log(training, grad_norm, bar)
        paused = time.perf_counter()
        if training.is_due(args.eval_every) or training.is_last_step:
            evaluate(training)
        if training.is_due(args.sample_every):
            sample(training)
        if training.is_due(args.ckpt_every) or training.is_last_step:
            save(training)
        training.watch.started += time.perf_counter() - paused
    bar.close()

    if accelerator.is_main_process:
        checkpoint.commit(folder.path / "final", lambda path: write_detector(training.detector, args, path))
    accelerator.wait_for_everyone()
    folder.status("finished", training.step)
    folder.log(f"finished: {folder.path}; best AP {training.best_ap:.4f} in best/, the last weights in final/")
    accelerator.end_training()
    return 0


def main(args: Arguments) -> int:
    """One training run; returns the exit code. The user's mistakes are told in one line, and every end of a run that
    has begun is noted in its status.json."""
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    try:
        training = start(args)
    except DataError as error:
        if rank == 0:  # all ranks read the same files and find the same fault
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    try:
        return loop(training, stop)
    except (DataError, NonFiniteLoss) as error:
        training.folder.status("failed", training.step, str(error))
        print(f"train.py: error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr)
        if isinstance(error, NonFiniteLoss):
            return 1
        if training.accelerator.num_processes == 1:  # with more, the others have gone on and cannot be asked
            save(training)
            print(f"train.py: saved at step {training.step}; --resume auto continues from there", file=sys.stderr)
        return 2
    except BaseException as error:
        training.folder.status("failed", training.step, repr(error))
        raise


if __name__ == "__main__":
    sys.exit(main(parse(Arguments)))
