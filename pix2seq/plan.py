"""Estimates a training run before it starts: steps, tokens, FLOPs, memory and hours of a recipe on given GPUs.

    python plan.py --config configs/coco_r50.yaml --gpu h100 --num_gpus 8

It takes the arguments of train.py and a few of its own. Without a dataset, the numbers of images and classes of COCO
2017 are used. Nothing is trained and no GPU is needed. Steps, tokens and FLOPs are exact; memory is the sum of
weights, gradients, optimizer state and activations; hours follow from the FLOPs and the utilisation of --mfu.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from pix2seq.argument_parser import parse, run_command
from pix2seq.arguments import MODEL_DEFAULTS, TrainArguments, argument, check_at_least, check_value
from pix2seq.data.coco import Annotations, load_annotations, read_coco
from pix2seq.models import build_model
from pix2seq.output_paths import check_output_file
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.training.cost import GPUS, model_step_cost
from pix2seq.training.datasets import find_splits, set_sizes, step_sampler
from pix2seq.training.optimizer import parameter_groups
from pix2seq.training.setup import prepare_for_training

COCO = "COCO 2017"
COCO_TRAIN_IMAGES, COCO_VAL_IMAGES, COCO_CLASSES, COCO_OBJECTS_PER_IMAGE = 118_287, 5_000, 80, 7
GIB = 2**30
CONTEXT_BYTES = 1.0 * GIB  # approximate size of the CUDA context, the cuDNN workspace and the NCCL buffers


@dataclass
class PlanArguments(TrainArguments):
    """Arguments of `plan.py`: those of `train.py` and the hardware."""

    _argument_group_name: ClassVar = "hardware"

    gpu: Literal[tuple(GPUS)] = argument("h100", "kind of GPU")  # type: ignore[valid-type]  # choices made at run time
    num_gpus: int = argument(1, "GPUs of all nodes together, one process each")
    shard: bool = argument(False, "weights, gradients and optimizer state are sharded over the GPUs (FSDP)")
    mfu: float = argument(0.3, "assumed model FLOPs utilisation: share of the peak FLOP/s that a step reaches")
    output: str | None = argument(None, "JSON file for the numbers")

    def __post_init__(self):
        if not any((self.root, self.train_shards, self.train_images, self.train_json, self.val_images, self.val_json)):
            self.root = COCO
        super().__post_init__()
        check_at_least(self, 1, "num_gpus")
        check_value(self, "mfu", 0 < self.mfu <= 1, "above 0 and at most 1")
        if self.shard and self.ema_decay:
            raise ValueError("--ema_decay: is not available with weights that FSDP shards")
        self.mixed_precision = self.mixed_precision or "bf16"
        if GPUS[self.gpu][self.mixed_precision] is None:
            raise ValueError(f"--gpu {self.gpu}: does not support {self.mixed_precision}; use --mixed_precision fp16")


def dataset_size(args: PlanArguments) -> tuple[int, int, int]:
    """Numbers of training images, validation images and classes."""
    if args.root == COCO:
        train_images, val_images, classes = COCO_TRAIN_IMAGES, COCO_VAL_IMAGES, COCO_CLASSES
    else:
        splits = find_splits(args)
        train, val = (read_coco((split or splits[0]).json) for split in splits)
        train_images, val_images, classes = len(train["images"]), len(val["images"]), len(train["categories"])
    if args.overfit:
        train_images = val_images = min(args.overfit, train_images)
    return train_images, val_images, classes


def sampled_images(args: PlanArguments, num_images: int) -> Annotations | int:
    """The annotations of the training images if arguments depend on them, otherwise their number."""
    needed = args.repeat_threshold or 0 in (args.image_size, args.num_bins, args.max_objects)
    if not needed or args.root == COCO:
        return num_images
    annotations = load_annotations(find_splits(args)[0], None, args.follow_links)
    return annotations.subset(range(num_images)) if args.overfit else annotations


def plan(args: PlanArguments) -> dict:
    """Computes all numbers of the estimate, by name. Raises UserError for arguments that cannot be trained with."""
    num_images, num_val, num_classes = dataset_size(args)
    images = sampled_images(args, num_images)
    set_sizes(args, images)
    with torch.device("meta"):
        model = build_model(
            category_ids=tuple(range(num_classes)),
            class_names=tuple(map(str, range(num_classes))),
            load_pretrained=False,
            **{name: getattr(args, name) for name in MODEL_DEFAULTS},
        )
    prepare_for_training(args, model, 1, torch.device("meta"))
    parameter_groups(model, args.lr, args.lr, args.weight_decay, args.layer_decay)  # validates --layer_decay
    sampler = step_sampler(args, images, 0, args.num_gpus)
    steps = args.max_steps or math.ceil(args.num_epochs * sampler.steps_per_epoch)
    sequence_length = TOKENS_PER_OBJECT * args.max_objects + (0 if args.noise_objects else 1)
    num_real = min(COCO_OBJECTS_PER_IMAGE, args.max_objects)
    loss_positions = TOKENS_PER_OBJECT * num_real + (args.max_objects - num_real if args.noise_objects else 1)
    precision = args.mixed_precision or "bf16"
    cost = model_step_cost(model, args.batch_size, sequence_length, precision, loss_positions)
    with torch.no_grad():
        visual_tokens = model.encode(torch.zeros(1, 3, args.image_size, args.image_size, device="meta")).shape[1]

    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # In float32: weights; for trained parameters gradients, two Adam moments and, with several processes, DDP buckets.
    state = 4 * total + (12 + (4 if args.num_gpus > 1 and not args.shard else 0)) * trained
    if args.shard:  # plus a full copy during evaluations and checkpoints
        state = state / args.num_gpus + 4 * total
    state += 4 * total if args.ema_decay else 0
    step_flops = cost.step_flops / args.batch_size * sampler.samples_per_step
    computed_flops = step_flops * (1 + cost.recomputed_flops / cost.step_flops)
    seconds = computed_flops / (args.num_gpus * GPUS[args.gpu][precision] * args.mfu)
    return {
        "gpu": args.gpu,
        "num_gpus": args.num_gpus,
        "precision": precision,
        "parameters": total,
        "trained_parameters": trained,
        "images": num_images,
        "images_per_step": sampler.samples_per_step,
        "visual_tokens_per_image": visual_tokens,
        "sequence_tokens_per_image": sequence_length,
        "steps": steps,
        "epochs": steps / sampler.steps_per_epoch,
        "evaluations": math.ceil(steps / args.eval_every) if args.eval_every else 1,
        "evaluation_images": num_val,
        "forward_flops_per_image": cost.forward_flops / args.batch_size,
        "step_flops": step_flops,
        "run_flops": step_flops * steps,
        "state_gib": state / GIB,
        "activations_gib": cost.activation_bytes / GIB,
        "memory_gib": (state + cost.activation_bytes + CONTEXT_BYTES) / GIB,
        "gpu_memory_gib": GPUS[args.gpu]["memory"],
        "mfu": args.mfu,
        "seconds_per_step": seconds,
        "hours": seconds * steps / 3600,
    }


def table(numbers: dict, args: PlanArguments) -> str:
    """The estimate as lines of text."""
    images_per_step = numbers["images_per_step"]
    tokens = numbers["visual_tokens_per_image"] + numbers["sequence_tokens_per_image"]
    fits = numbers["memory_gib"] <= 0.9 * numbers["gpu_memory_gib"]
    batch = f"{args.batch_size} x {args.gradient_accumulation_steps} accumulation x {args.num_gpus} GPUs"
    rows = [
        ("data", f"{numbers['images']:,} images" + (f" ({COCO})" if args.root == COCO else "")),
        ("GPUs", f"{numbers['num_gpus']} x {numbers['gpu']}, {numbers['precision']}"),
        (
            "model",
            f"{numbers['parameters'] / 1e6:.1f} M parameters, {numbers['trained_parameters'] / 1e6:.1f} M trained",
        ),
        ("step", f"{images_per_step} images ({batch})"),
        (
            "tokens",
            f"{numbers['visual_tokens_per_image']} visual + {numbers['sequence_tokens_per_image']} sequence tokens "
            f"per image, {tokens * images_per_step:,} per step",
        ),
        ("run", f"{numbers['steps']:,} steps, {numbers['epochs']:.1f} epochs"),
        (
            "FLOPs",
            f"{numbers['step_flops'] / images_per_step:.2e} per image, {numbers['step_flops']:.2e} per step, "
            f"{numbers['run_flops']:.2e} in total",
        ),
        (
            "memory",
            f"{numbers['memory_gib']:.1f} GiB of {numbers['gpu_memory_gib']} per GPU (state "
            f"{numbers['state_gib']:.1f}, activations {numbers['activations_gib']:.1f})"
            + ("" if fits else ": does not fit, or only just"),
        ),
        (
            "time",
            f"{numbers['hours']:,.1f} h, {numbers['seconds_per_step']:.2f} s per step at {numbers['mfu']:.0%} "
            f"utilisation (--mfu); {numbers['evaluations']} evaluations of {numbers['evaluation_images']:,} images",
        ),
        ("loading", f"{images_per_step / numbers['seconds_per_step']:,.0f} images/s are needed"),
    ]
    return "\n".join(f"{name:8}{text}" for name, text in rows)


def run_plan(args: PlanArguments) -> int:
    """Prints the estimate and writes --output; returns the exit code. Raises UserError."""
    if args.output:
        splits = () if args.root == COCO else find_splits(args)
        inputs = [split.json for split in splits if split is not None]
        check_output_file(Path(args.output), [*inputs, *([Path(args.config)] if args.config else [])])
    numbers = plan(args)
    print(table(numbers, args))
    if args.output:
        Path(args.output).write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def main(argv: list[str] | None = None, program: str = "plan.py") -> int:
    """Parses the command line and prints the estimate; returns the exit code."""
    return run_command(run_plan, parse(PlanArguments, argv, program), program=program)
