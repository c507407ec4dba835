"""What a run will take, before anyone pays for it: steps, tokens, FLOPs, memory and hours of a recipe on given GPUs.

    python plan.py --config configs/coco_r50.yaml --gpu h100 --num_gpus 8

Takes the flags of train.py and a few of its own. Without a dataset, COCO 2017's numbers of images and classes are
used. Nothing is trained and no GPU is needed. Steps, tokens and FLOPs are exact; memory is what weights, gradients,
optimizer and activations add up to; hours are the FLOPs at the share of the GPU's peak that --mfu says.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pix2seq.argument_parser import parse, run_command
from pix2seq.arguments import MODEL_DEFAULTS, TrainArguments, argument
from pix2seq.data.coco import read_coco
from pix2seq.models import build_model
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.training.cost import GPUS, model_step_cost
from pix2seq.training.optimizer import parameter_groups
from pix2seq.training.setup import find_splits, prepare_for_training, step_sampler

COCO = "COCO 2017"
COCO_TRAIN_IMAGES, COCO_VAL_IMAGES, COCO_CLASSES, COCO_OBJECTS = 118_287, 5_000, 80, 7
GIB = 2**30
CONTEXT_BYTES = 1.0 * GIB  # CUDA's own, cuDNN's work space and NCCL's buffers, about


@dataclass
class PlanArguments(TrainArguments):
    gpu: Literal[tuple(GPUS)] = argument("h100", "kind of GPU")
    num_gpus: int = argument(1, "GPUs, all nodes together; one process each")
    shard: bool = argument(False, "weights, gradients and optimizer are sharded over the GPUs (FSDP)")
    mfu: float = argument(0.3, "share of the GPU's peak that a step reaches: an assumption, measure it")
    output: str | None = argument(None, "JSON file to write as well")

    def __post_init__(self):
        if not any((self.root, self.train_shards, self.train_images, self.train_json, self.val_images, self.val_json)):
            self.root = COCO
        super().__post_init__()
        for name, good, allowed in (
            ("num_gpus", self.num_gpus >= 1, "at least 1"),
            ("mfu", 0 < self.mfu <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {allowed}")
        if self.shard and self.ema_decay:
            raise ValueError("--ema_decay: is not kept of weights that FSDP shards")
        if self.output and not Path(self.output).parent.is_dir():
            raise ValueError(f"--output {self.output}: its folder does not exist")
        if self.output and Path(self.output).is_dir():
            raise ValueError(f"--output {self.output}: is a folder, and a file is to be written")
        self.mixed_precision = self.mixed_precision or "bf16"
        if GPUS[self.gpu][self.mixed_precision] is None:
            raise ValueError(f"--gpu {self.gpu}: has no {self.mixed_precision}; use --mixed_precision fp16")


def dataset_size(args: PlanArguments) -> tuple[int, int, int]:
    """Images to train on, images to evaluate, classes."""
    if args.root == COCO:
        sizes = COCO_TRAIN_IMAGES, COCO_VAL_IMAGES, COCO_CLASSES
    else:
        splits = find_splits(args)
        train, val = (read_coco((split or splits[0]).json) for split in splits)
        sizes = len(train["images"]), len(val["images"]), len(train["categories"])
    return (min(args.overfit, sizes[0]),) * 2 + sizes[2:] if args.overfit else sizes


def plan(args: PlanArguments) -> dict:
    """All figures by name. Raises UserError."""
    num_images, num_val, num_classes = dataset_size(args)
    with torch.device("meta"):
        model = build_model(
            category_ids=tuple(range(num_classes)),
            class_names=tuple(map(str, range(num_classes))),
            load_pretrained=False,
            **{name: getattr(args, name) for name in MODEL_DEFAULTS},
        )
    prepare_for_training(args, model, 1, torch.device("meta"))
    parameter_groups(model, args.lr, args.lr, args.weight_decay, args.layer_decay)  # says what cannot be trained so
    sampler = step_sampler(args, num_images, 0, args.num_gpus)
    steps = args.max_steps or math.ceil(args.num_epochs * sampler.steps_per_epoch)
    length = TOKENS_PER_OBJECT * args.max_objects + (0 if args.noise_objects else 1)
    real = TOKENS_PER_OBJECT * min(COCO_OBJECTS, args.max_objects)
    targets = real + (args.max_objects - min(COCO_OBJECTS, args.max_objects) if args.noise_objects else 1)
    cost = model_step_cost(model, args.batch_size, length, args.mixed_precision, targets)
    with torch.no_grad():
        visual = model.encode(torch.zeros(1, 3, args.image_size, args.image_size, device="meta")).shape[1]

    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    # float32: weights; of what learns gradients, Adam's two averages and, with several processes, DDP's buckets.
    state = 4 * total + (12 + (4 if args.num_gpus > 1 and not args.shard else 0)) * learning
    if args.shard:  # and one copy whole, of each evaluation and checkpoint
        state = state / args.num_gpus + 4 * total
    state += 4 * total if args.ema_decay else 0
    memory = state + cost.activation_bytes + CONTEXT_BYTES
    step_flops = cost.step_flops / args.batch_size * sampler.samples_per_step
    computed = step_flops * (1 + cost.recomputed_flops / cost.step_flops)
    seconds = computed / (args.num_gpus * GPUS[args.gpu][args.mixed_precision] * args.mfu)
    return {
        "gpu": args.gpu,
        "num_gpus": args.num_gpus,
        "precision": args.mixed_precision,
        "parameters": total,
        "learning_parameters": learning,
        "images": num_images,
        "images_a_step": sampler.samples_per_step,
        "visual_tokens_an_image": visual,
        "sentence_tokens_an_image": length,
        "steps": steps,
        "epochs": steps / sampler.steps_per_epoch,
        "evaluations": math.ceil(steps / args.eval_every) if args.eval_every else 1,
        "evaluation_images": num_val,
        "forward_flops_an_image": cost.forward_flops / args.batch_size,
        "step_flops": step_flops,
        "run_flops": step_flops * steps,
        "state_gib": state / GIB,
        "activations_gib": cost.activation_bytes / GIB,
        "memory_gib": memory / GIB,
        "gpu_memory_gib": GPUS[args.gpu]["memory"],
        "mfu": args.mfu,
        "seconds_a_step": seconds,
        "hours": seconds * steps / 3600,
    }


def table(found: dict, args: PlanArguments) -> str:
    tokens = found["visual_tokens_an_image"] + found["sentence_tokens_an_image"]
    fits = found["memory_gib"] <= 0.9 * found["gpu_memory_gib"]
    split = f"{args.batch_size} x {args.gradient_accumulation_steps} accumulated x {args.num_gpus} GPUs"
    rows = [
        ("data", f"{found['images']:,} images" + (f" ({COCO})" if args.root == COCO else "")),
        ("GPUs", f"{found['num_gpus']} x {found['gpu']}, {found['precision']}"),
        ("model", f"{found['parameters'] / 1e6:.1f} M parameters, {found['learning_parameters'] / 1e6:.1f} M learn"),
        ("step", f"{found['images_a_step']} images ({split})"),
        (
            "tokens",
            f"{found['visual_tokens_an_image']} visual + {found['sentence_tokens_an_image']} of the sentence an "
            f"image, {tokens * found['images_a_step']:,} a step",
        ),
        ("run", f"{found['steps']:,} steps, {found['epochs']:.1f} epochs"),
        (
            "FLOPs",
            f"{found['step_flops'] / found['images_a_step']:.2e} an image, {found['step_flops']:.2e} a step, "
            f"{found['run_flops']:.2e} in all",
        ),
        (
            "memory",
            f"{found['memory_gib']:.1f} GiB a GPU of {found['gpu_memory_gib']} (state {found['state_gib']:.1f}, "
            f"activations {found['activations_gib']:.1f})" + ("" if fits else ": does not fit, or barely"),
        ),
        (
            "time",
            f"{found['hours']:,.1f} h, {found['seconds_a_step']:.2f} s a step, if a step reaches {found['mfu']:.0%} "
            f"of the peak (--mfu); and {found['evaluations']} evaluations of {found['evaluation_images']:,} images",
        ),
        ("loaders", f"must deliver {found['images_a_step'] / found['seconds_a_step']:,.0f} images/s for that"),
    ]
    return "\n".join(f"{name:8}{text}" for name, text in rows)


def run_plan(args: PlanArguments) -> int:
    found = plan(args)
    print(table(found, args))
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def main(argv: list[str] | None = None, program: str = "plan.py") -> int:
    """Parses the command line and prints the estimate; returns the exit code."""
    return run_command(run_plan, parse(PlanArguments, argv, program), program=program)
