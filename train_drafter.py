"""Teaches a trained detector to write several tokens at once.

    python train_drafter.py --checkpoint runs/NAME/best --output_dir runs/NAME/drafted
    python evaluate.py --checkpoint runs/NAME/drafted

The detector stays as it is, to the bit. It writes sentences about its training images, and a small network beside it
learns to guess, from what the decoder thinks before a token, what it will say after the next ones (see
pix2seq/model/drafter.py; pix2seq/decoding/drafting.py uses it).
"""

import os
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from pix2seq import checkpoint
from pix2seq.assembly import find_splits, step_sampler, training_set
from pix2seq.colors import paint
from pix2seq.command_line import parse, read_flags
from pix2seq.config import Arguments, flag
from pix2seq.data import Categories, TrainDataset, load_annotations, train_loader
from pix2seq.data.unreadable import UnreadableImages
from pix2seq.decoding import DecodingOptions, write
from pix2seq.errors import UserError
from pix2seq.model import Pix2SeqForObjectDetection, load_detector
from pix2seq.saving import DISK_ERRORS, write_detector
from pix2seq.tokenizer import CLASS_SLOT, SLOTS, TOKENS_PER_OBJECT

KNOWN = {field.name for field in fields(Arguments)}  # another version's flags may be others
WHERE = ("root", "train_images", "train_json", "train_shards")
# Where a noise object lies is said nearly at random, and guesses of it teach little.
NOISE_WEIGHT = 0.1


@dataclass
class DrafterArguments:
    checkpoint: str | None = flag(None, "folder of a trained detector: OUT/best or OUT/final")
    output_dir: str | None = flag(None, "where the detector with its drafter goes: a new folder")
    root: str | None = flag(None, "COCO layout, of which the train split is read (default: that of training)")
    train_images: str | None = flag(None, "folder of images, for any other layout")
    train_json: str | None = flag(None, "COCO annotation file of the images")
    num_layers: int = flag(1, "layers of the drafter")
    max_steps: int = flag(3000, "steps of training")
    batch_size: int = flag(32, "images in a step")
    lr: float = flag(1e-3, "peak learning rate")
    seed: int = flag(0, "decides data order, augmentation, sentences and initial weights")
    num_workers: int = flag(2, "data loading processes")
    mixed_precision: Literal["no", "bf16"] | None = flag(None, "default: that of training, or no for fp16")
    log_every: int = flag(100, "steps between two lines of progress")

    def __post_init__(self):
        for name in ("checkpoint", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name}: missing")
        if self.root is not None and (self.train_images or self.train_json):
            raise ValueError("--root and --train_json exclude each other: name the dataset one way")
        if (self.train_images is None) != (self.train_json is None):
            raise ValueError("--train_images and --train_json go together")
        for name in ("num_layers", "max_steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 0 < self.lr < 1:
            raise ValueError(f"--lr {self.lr}: must be above 0 and below 1")
        if self.num_workers < 0 or not 0 <= self.seed < 2**32:
            raise ValueError(f"--num_workers {self.num_workers}, --seed {self.seed}: at least 0, and below 2^32")


def draft_loss(
    model: Pix2SeqForObjectDetection, pixel_values: torch.Tensor, options: DecodingOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, S, S) -> how far the drafter's guesses are from what the detector says, a scalar with gradients
    for the drafter; and the shares of x1, y2, x2 and class that it guesses right, (4,), of objects that are there and
    given the tokens before.

    The target of a guess is the detector's whole distribution after the same tokens. Guesses start after each token
    of an object but its class, and go on to its end.
    """
    batch, count = len(pixel_values), options.max_objects
    with torch.no_grad():
        visual = model.encode(pixel_values)
        tokens = write(model, pixel_values, model.tokenizer, options).tokens[:, : TOKENS_PER_OBJECT * count].clone()
        bos = torch.full_like(tokens[:, :1], model.tokenizer.bos_id)
        thoughts = model.decoder.read(visual, torch.cat([bos, tokens[:, :-1]], dim=1))
        targets = model.decoder.lm_head(thoughts).float().softmax(-1)
    # All objects of all pictures (N), slot by slot.
    tokens, thoughts, targets = (
        part.unflatten(1, (count, TOKENS_PER_OBJECT)).flatten(0, 1) for part in (tokens, thoughts, targets)
    )
    written = (tokens != model.tokenizer.eos_id).all(dim=1)
    real = written & (tokens[:, CLASS_SLOT] != model.tokenizer.noise_id)
    weights = torch.where(real, 1.0, NOISE_WEIGHT) * written
    memory = model.drafter.look(visual)
    loss, right = 0.0, []
    thoughts = thoughts[:, :CLASS_SLOT]
    for ahead in range(1, TOKENS_PER_OBJECT):
        starts = TOKENS_PER_OBJECT - ahead  # guesses from slot 0, 1, ..., each now at its `ahead`-th token
        slots = torch.arange(ahead, TOKENS_PER_OBJECT, device=tokens.device).repeat(len(tokens))
        thoughts, logits = model.draft(thoughts.flatten(0, 1), tokens[:, ahead - 1 : -1].flatten(), slots, memory)
        losses = F.cross_entropy(logits.float(), targets[:, ahead:].flatten(0, 1), reduction="none")
        losses = losses.unflatten(0, (-1, starts))
        # Whether an object is one is always worth guessing.
        loss = loss + (losses[:, :-1].sum(dim=1) * weights).sum() + (losses[:, -1] * written).sum()
        first = logits.unflatten(0, (-1, starts))[:, 0].argmax(-1) == tokens[:, ahead]
        right.append((first & real).sum() / real.sum().clamp(min=1))
        thoughts = thoughts.unflatten(0, (-1, starts))[:, :-1]
    return loss / (batch * count * TOKENS_PER_OBJECT), torch.stack(right)


def main(args: DrafterArguments) -> int:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("train_drafter.py: runs as one process; start it with python, not with accelerate launch")
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output_dir {output}: is there already; name a new folder")
    try:  # before hours of work, not after them
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be made ({error.strerror})") from None
    transformers_logging.disable_progress_bar()
    model, had = load_detector(args.checkpoint, "--checkpoint"), read_flags(args.checkpoint, "--checkpoint")
    training, flags = training_flags(args, had), as_arguments(args, had)
    categories = Categories(tuple(model.config.category_ids), model.config.class_names)
    annotations = load_annotations(find_splits(training)[0], categories, training.follow_links)
    if training.overfit:
        annotations = annotations.subset(range(min(training.overfit, len(annotations))))
    if not annotations.trainable.any():
        raise UserError(f"{annotations.split.json}: holds no objects to learn from")
    data = training_set(training, annotations)
    precision = args.mixed_precision or had.get("mixed_precision")
    # The gradients of fp16 would need scaling, and a drafter is small.
    precision = "no" if precision == "fp16" else precision
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    model = model.to(accelerator.device).eval().requires_grad_(False)
    torch.manual_seed(args.seed)
    model.add_drafter(args.num_layers)
    learn(args, model, data, training, accelerator)
    try:
        checkpoint.commit(output, partial(write_detector, model, flags))
    except DISK_ERRORS as error:
        raise UserError(f"--output_dir {output}: could not be written ({error})") from None
    print(f"written to {output}; evaluate.py --draft says how it is used")
    return 0


def training_flags(args: DrafterArguments, had: dict) -> Arguments:
    """Those the detector was trained with, but for the images that are named."""
    given = {name: getattr(args, name) for name in ("root", "train_images", "train_json") if getattr(args, name)}
    if not had:
        raise UserError(f"--checkpoint {args.checkpoint}: has no training.yaml, which says how it was trained")
    if given:
        had = {name: value for name, value in had.items() if name not in WHERE} | given
    if args.train_json:  # no images are evaluated, but flags want them
        had |= {"val_images": args.train_images, "val_json": args.train_json}
    if args.root:
        had |= {"val_images": None, "val_json": None}
    training = as_arguments(args, had)
    return replace(training, batch_size=args.batch_size, seed=args.seed, gradient_accumulation_steps=1)


def as_arguments(args: DrafterArguments, had: dict) -> Arguments:
    """Raises UserError for flags that are not those of a run."""
    try:
        return Arguments(**{name: value for name, value in had.items() if name in KNOWN})
    except (TypeError, ValueError) as error:
        raise UserError(f"--checkpoint {args.checkpoint}: its training.yaml says {error}") from None


def learn(
    args: DrafterArguments,
    model: Pix2SeqForObjectDetection,
    data: TrainDataset,
    training: Arguments,
    accelerator: Accelerator,
) -> None:
    """Trains the drafter, and nothing else."""
    optimizer = torch.optim.AdamW(model.drafter.parameters(), lr=args.lr, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)
    sampler = step_sampler(training, len(data.annotations), 0, 1)
    batches = iter(train_loader(data, sampler, args.num_workers, pin_memory=accelerator.device.type == "cuda"))
    options = replace(model.decoding_options, draft="off", stop_after_noise=0)
    unreadable = UnreadableImages.of(data.annotations, training.max_unreadable)
    bar = tqdm(range(1, args.max_steps + 1), desc="drafter", disable=None)
    for step in bar:
        batch = next(batches)
        for line in sorted(unreadable.new([batch])):
            tqdm.write(f"replaced by another image: {line}")
            unreadable.lines.add(line)
        unreadable.enforce()
        pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
        if "colors" in batch:
            pixel_values = paint(pixel_values, batch["size"], batch["colors"])
        with accelerator.autocast():
            loss, right = draft_loss(model, pixel_values, replace(options, seed=(args.seed + step) % 2**32))
        if not loss.isfinite():
            raise UserError(f"--lr {args.lr}: the loss of step {step} is not finite; try a smaller one")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % args.log_every == 0 or step == args.max_steps:
            shares = "  ".join(f"{name} {share:.2f}" for name, share in zip(SLOTS[1:], right.tolist(), strict=True))
            tqdm.write(f"step {step}/{args.max_steps}  loss {loss:.4f}  guessed right: {shares}")


def run(args: DrafterArguments) -> int:
    """`main` with mistakes of the user turned into one line and exit code 2."""
    try:
        return main(args)
    except UserError as error:
        print(f"train_drafter.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run(parse(DrafterArguments)))
