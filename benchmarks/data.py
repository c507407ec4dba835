"""How fast the training loader makes examples, beside two peers on the same pictures in the same run.

python -m benchmarks.data --root /path/to/coco --output docs/results/data_cpu.json              (2 cores, 2 minutes)

pix2seq           train.py's TrainDataset with its default flags; hands over uint8, which the model normalises
torchvision       large-scale jitter as in torchvision's detection reference, with transforms.v2 on tensors and our
                  range of scales; hands over normalised floats
torchvision_raw   without the normalisation, which that reference leaves to its models
torchvision_pil   with it, and on PIL images up to there
detr-style        DETR's: a size drawn, or with probability 0.5 a size, a crop and another size; its short sides of
                  480 ... 800 are scaled by side/1333, the others are as they are; hands over normalised floats
From the bytes of a file to a batch (B, 3, S, S) in memory, on one core, in turn; ratios are of times of a round.
as_examples leaves the last step out: torchvision's reference makes its batches on the device. Ours resizes without
antialiasing, the peers with it. A good part of the difference is uint8: a quarter of the memory to fill and to copy.

Also: the same pictures enlarged to --large_side pixels (4000; a test sets it lower), where the time of ours goes, what
loader processes keep in memory, and how long a GPU would wait for data, which is computed and not measured.
"""

import argparse
import io
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from benchmarks.record import environment
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.data import Annotations, StepSampler, TrainDataset, train_loader
from pix2seq.data.image_files import BadImageError, Folder, ImageFile
from pix2seq.data.loaders import collate
from pix2seq.errors import UserError
from pix2seq.plan import PlanArguments, plan
from pix2seq.training.datasets import load_data

OURS = "pix2seq"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
GPU, MFU, RECIPE = "h100", 0.3, "configs/coco_r50.yaml"
RESNET50 = "{model_type: resnet}"  # the recipe's backbone without its weights: nothing is downloaded
WORKERS_OF_A_GPU, WAIT_ALLOWED = 16, 0.05
BATCH = 8  # images
PASSES = 3  # over the pictures, to see where the time goes

Maker = Callable[[int, int], dict]  # of an index and a round: pixel_values (3, S, S), image_id and targets


def training_set(root: str, image_size: int, num_images: int) -> TrainDataset:
    """What train.py trains on by default: the first images of the split, without those that cannot be read."""
    words = ["--root", root, "--image_size", image_size, "--overfit", num_images]
    dataset = load_data(parse(TrainArguments, list(map(str, words))))[0]
    whole = dataset.annotations

    def readable(index: int) -> bool:
        try:
            return whole.image_file(index).pixels() is not None
        except BadImageError:
            return False

    if not (indices := [index for index in range(len(whole)) if readable(index)]):
        raise UserError(f"--root {root}: none of its first {num_images} images can be read")
    return replace(dataset, annotations=whole.subset(indices))


def opened(annotations: Annotations, index: int) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
    """The picture as peers open it, its boxes (xyxy pixels) and its labels."""
    picture = Image.open(io.BytesIO(annotations.store.read(annotations.locations[index]))).convert("RGB")
    boxes, labels = annotations.objects(index)
    return picture, torch.from_numpy(boxes).float(), torch.from_numpy(labels)


def torchvision_maker(annotations: Annotations, side: int, pil: bool = False, normalise: bool = True) -> Maker:
    augment = [v2.RandomHorizontalFlip(), v2.ScaleJitter((side, side), (0.3, 2.0))]
    augment += [v2.RandomCrop((side, side), pad_if_needed=True), v2.SanitizeBoundingBoxes()]
    augment = [*augment, v2.ToImage()] if pil else [v2.ToImage(), *augment]
    augment += [v2.ToDtype(torch.float32, scale=True), *([v2.Normalize(**IMAGENET)] if normalise else [])]
    transform = v2.Compose(augment)

    def make(index: int, number: int) -> dict:
        picture, boxes, labels = opened(annotations, index)
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=(picture.height, picture.width))
        made = transform({"pixel_values": picture, "boxes": boxes, "labels": labels})
        return made | {"image_id": annotations.image_ids[index]}

    return make


def detr_maker(annotations: Annotations, side: int) -> Maker:
    short_sides = [short * side / 1333 for short in range(480, 801, 32)]

    def resized(picture: Image.Image, boxes: torch.Tensor, short: float, longest: float = math.inf):
        ratio = min(short / min(picture.size), longest / max(picture.size))
        size = [max(1, round(length * ratio)) for length in picture.size]
        scale = torch.tensor([new / old for new, old in zip(size, picture.size, strict=True)] * 2)
        return picture.resize(size, Image.Resampling.BILINEAR), boxes * scale

    def make(index: int, number: int) -> dict:
        picture, boxes, labels = opened(annotations, index)
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([1, 0, 1, 0]) * picture.width
        if random.random() < 0.5:
            picture, boxes = resized(picture, boxes, random.choice([400, 500, 600]))
            width, height = (random.randint(384, min(length, 600)) for length in picture.size)
            left, top = random.randint(0, picture.width - width), random.randint(0, picture.height - height)
            picture = picture.crop((left, top, left + width, top + height))
            boxes = clip_boxes_to_image(boxes - torch.tensor([left, top, left, top]), (height, width))
            kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, labels = boxes[kept], labels[kept]
        picture, boxes = resized(picture, boxes, random.choice(short_sides), side)
        pixels = F.normalize(F.to_dtype(F.pil_to_tensor(picture), torch.float32, scale=True), **IMAGENET)
        canvas = torch.zeros(3, side, side)
        canvas[:, : picture.height, : picture.width] = pixels
        boxes = box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([picture.width, picture.height] * 2)
        return {"pixel_values": canvas, "boxes": boxes, "labels": labels, "image_id": annotations.image_ids[index]}

    return make


def makers_of(dataset: TrainDataset) -> dict[str, Maker]:
    annotations, side = dataset.annotations, dataset.transform.image_size
    return {
        OURS: lambda index, number: dataset[number, index, 0],
        "torchvision": torchvision_maker(annotations, side),
        "torchvision_raw": torchvision_maker(annotations, side, normalise=False),
        "torchvision_pil": torchvision_maker(annotations, side, pil=True),
        "detr-style": detr_maker(annotations, side),
    }


def race(makers: dict[str, Maker], num_images: int, rounds: int, name: str) -> dict:
    """Images/s of each, and times_as_fast: ours against each peer; as examples, and as batches ready for the device.
    They take turns at every batch, so that what else the machine does slows all of them. Round 0 is short and does not
    count."""
    examples, batches = ({maker: [] for maker in makers} for _ in range(2))
    for number in range(rounds + 1):
        order = np.random.default_rng(number).permutation(num_images)[: None if number else BATCH].tolist()
        spent = {maker: np.zeros(2) for maker in makers}
        for first in range(0, len(order), BATCH):
            for maker, make in makers.items():
                random.seed(number * num_images + first)
                torch.manual_seed(number * num_images + first)
                clock = [time.perf_counter()]
                made = [make(index, number) for index in order[first : first + BATCH]]
                clock.append(time.perf_counter())
                if maker == OURS:
                    collate(made)
                else:
                    torch.stack([example["pixel_values"] for example in made])
                clock.append(time.perf_counter())
                spent[maker] += np.diff(clock)
        for maker in makers:
            examples[maker].append(spent[maker][0] / len(order))
            batches[maker].append(spent[maker].sum() / len(order))
        if number:
            print(f"{name}, round {number}: " + ", ".join(f"{k} {1 / v[-1]:.1f}/s" for k, v in batches.items()))
    return {"as_batches": compared(batches), "as_examples": compared(examples)}


def compared(seconds: dict[str, list[float]]) -> dict:
    """By the seconds an image took in each round, of which the first does not count; ours is the first maker."""
    seconds = {maker: values[1:] for maker, values in seconds.items()}
    ours, *peers = seconds
    ratios = {p: spread([b / a for a, b in zip(seconds[ours], seconds[p], strict=True)]) for p in peers}
    rates = {maker: spread([1 / value for value in values]) for maker, values in seconds.items()}
    faster = max(peers, key=lambda peer: rates[peer]["median"])
    return {"images_per_s": rates, "times_as_fast": ratios | {"faster peer": {"name": faster} | ratios[faster]}}


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def enlarged(dataset: TrainDataset, count: int, longest: int, folder: Path) -> TrainDataset:
    """The first `count` pictures as JPEGs of that many pixels on the long side."""
    annotations = dataset.annotations.subset(range(min(count, len(dataset.annotations))))
    boxes, sizes = annotations.boxes.copy(), []
    names = [f"{index}.jpg" for index in range(len(annotations))]
    for index, name in enumerate(names):
        picture = opened(annotations, index)[0]
        size = [max(1, round(length * longest / max(picture.size))) for length in picture.size]
        scale = np.array([new / old for new, old in zip(size, picture.size, strict=True)] * 2)
        boxes[annotations.offsets[index] : annotations.offsets[index + 1]] *= scale
        sizes.append(size[::-1])
        picture.resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=90)
    places, sizes = np.array(names, dtype=np.dtypes.StringDType()), np.array(sizes, dtype=np.int32)
    large = replace(annotations, store=Folder(folder), locations=places, sizes=sizes, boxes=boxes)
    return replace(dataset, annotations=large)


class TimedPicture(ImageFile):
    """Notes how long its pixels took."""

    seconds = 0.0

    def pixels(self, at_least: tuple[int, int] | None = None) -> torch.Tensor:
        started = time.perf_counter()
        pixels = super().pixels(at_least)
        self.seconds += time.perf_counter() - started
        return pixels


def ms_per_image(dataset: TrainDataset) -> dict[str, float]:
    """The parts of ours, one after the other as TrainDataset calls them, and what is left of the whole."""
    annotations, count = dataset.annotations, len(dataset.annotations)
    spent = np.zeros(4)
    started = time.perf_counter()
    for number in range(PASSES):
        for index in range(count):
            rng = np.random.default_rng((dataset.seed, number, index, 0))
            boxes, labels = annotations.objects(index)
            size = tuple(annotations.sizes[index].tolist())
            clock = [time.perf_counter()]
            data = annotations.store.read(annotations.locations[index])
            clock.append(time.perf_counter())
            picture = TimedPicture(data, size if min(size) > 0 else None)
            clock.append(time.perf_counter())
            canvas = dataset.transform(picture, boxes, rng)
            clock.append(time.perf_counter())
            dataset.sequence_builder(canvas.boxes, labels[canvas.kept], rng, canvas.valid_fraction)
            clock.append(time.perf_counter())
            spent += np.diff(clock) + [0, picture.seconds, -picture.seconds, 0]
    total = time.perf_counter() - started
    names = ("read", "decode", "resize, crop, flip, pad", "sentence", "rest", "all")
    return dict(zip(names, 1000 / (PASSES * count) * np.array([*spent, total - spent.sum(), total]), strict=True))


def own_memory(processes: list[psutil.Process]) -> list[float]:
    """MB that only each of them holds, once that has come to rest: workers make a few batches ahead."""
    before, now = [math.inf], []
    for _ in range(40):
        now = [process.memory_full_info().uss / 1e6 for process in processes]
        if abs(sum(now) - sum(before)) < 0.5:
            break
        before = now
        time.sleep(0.3)
    return now


def memory_mb(dataset: TrainDataset, num_workers: int) -> dict:
    """Of loader processes above that of one that does nothing, and of the main process above what it was before it had
    any: as long as they live it shares its memory with them."""
    main, count, found = psutil.Process(), len(dataset.annotations), {"workers": num_workers, "batch_size": BATCH}
    others = set(main.children())
    batches = iter(DataLoader([torch.zeros(1)] * 1000, num_workers=num_workers))
    next(batches)
    found["bare_worker"] = statistics.mean(own_memory([*set(main.children()) - others]))
    del batches  # ends its workers
    at_first, taken = own_memory([main])[0], 0
    batches = iter(train_loader(dataset, StepSampler(count, BATCH), num_workers, pin_memory=False))
    for epochs in (1, 3):
        while taken < epochs * count:
            next(batches)
            taken += BATCH
        above = [own - found["bare_worker"] for own in own_memory([*set(main.children()) - others])]
        found[f"worker_after_{epochs}"] = {"mean": statistics.mean(above), "largest": max(above)}
    del batches
    return found | {"main_after_3": own_memory([main])[0] - at_first}


def gpu_appetite(args: argparse.Namespace) -> dict:
    """Images/s that a GPU trains on, and where that is from."""
    if args.step_ms:
        said = f"measured: a step of {args.step_batch} images takes {args.step_ms} ms"
        return {"images_per_s_eaten": 1000 * args.step_batch / args.step_ms, "images_per_s_eaten_is": said}
    words = ["--config", RECIPE, "--backbone", RESNET50, "--image_size", args.image_size]
    words += ["--gpu", GPU, "--mixed_precision", "bf16", "--mfu", MFU]
    found = plan(parse(PlanArguments, list(map(str, words))))
    said = f"computed: FLOPs of {RECIPE} on one {GPU} in bf16, if a step reaches {MFU:.0%} of its peak (an assumption)"
    return {"images_per_s_eaten": found["images_a_step"] / found["seconds_a_step"], "images_per_s_eaten_is": said}


def data_wait(appetite: dict, made: float) -> dict:
    """How long a GPU would wait for data, from what one core makes in a second."""
    eaten = appetite["images_per_s_eaten"]
    return {
        "status": "computed, not measured: if cores are as fast as this one and do not slow each other",
        **appetite,
        "images_per_s_made_by_a_core": made,
        f"cores_for_less_than_{WAIT_ALLOWED:.0%}_wait": math.floor((1 - WAIT_ALLOWED) * eaten / made) + 1,
        f"wait_share_with_{WORKERS_OF_A_GPU}_workers": max(0.0, 1 - WORKERS_OF_A_GPU * made / eaten),
    }


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    dataset = training_set(args.root, args.image_size, args.num_images)
    appetite = gpu_appetite(args)
    annotations, count = dataset.annotations, len(dataset.annotations)
    print(f"{count} images; memory of {args.num_workers} workers ...")
    memory = memory_mb(dataset, args.num_workers)
    main_race = race(makers_of(dataset), count, args.rounds, f"{count} images")
    with tempfile.TemporaryDirectory() as folder:
        print(f"enlarging {min(count, args.large_images)} of them to {args.large_side} pixels ...")
        large = enlarged(dataset, args.large_images, args.large_side, Path(folder))
        large_race = race(makers_of(large), len(large.annotations), args.large_rounds, f"{args.large_side} pixels")
    return {
        "environment": environment(torch.device("cpu")),
        "flags": {name: value for name, value in vars(args).items() if name not in ("output", "root")},
        "images": {
            "count": count,
            "objects_an_image": int(annotations.trainable.sum()) / count,
            "mean_kb": statistics.mean(len(annotations.store.read(place)) for place in annotations.locations) / 1000,
            "mean_megapixels": float(np.prod(annotations.sizes, axis=1).mean()) / 1e6,
            "handed_over": {
                OURS: "uint8, normalised by the model",
                "torchvision_raw": "float32, normalised by the model",
                "others": "float32, normalised",
            },
        },
        **main_race,
        "large_images": {"count": len(large.annotations), "long_side": args.large_side, **large_race},
        "ms_per_image": ms_per_image(dataset),
        "memory_mb": memory,
        "data_wait": data_wait(appetite, main_race["as_batches"]["images_per_s"][OURS]["median"]),
    }


def report(found: dict) -> str:
    lines, memory = [], found["memory_mb"]
    large = found["large_images"]
    races = {"": found["as_batches"], ", without batching": found["as_examples"]}
    races[f", {large['long_side']} pixels"] = large["as_batches"]
    for title, part in races.items():
        lines += [f"{k:16}{v['median']:8.1f} images/s on one core{title}" for k, v in part["images_per_s"].items()]
        for peer, times in part["times_as_fast"].items():
            name = f"{peer} ({times['name']})" if "name" in times else peer
            lines.append(f"  {{median:.2f}} times as fast as {name} ({{min:.2f}} to {{max:.2f}})".format(**times))
    lines.append("ms an image: " + ", ".join(f"{part} {ms:.2f}" for part, ms in found["ms_per_image"].items()))
    lines.append(
        "MB: worker {worker_after_1[mean]:.1f} after 1 epoch, {worker_after_3[mean]:.1f} after 3".format(**memory)
    )
    lines.append(f"MB: main process {memory['main_after_3']:.1f} after 3 epochs")
    lines += [f"{name.replace('_', ' ')}: {value}" for name, value in found["data_wait"].items()]
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(words: list[str] | None = None) -> int:
    parser = Parser(description="Time the training loader beside two peers.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--root", required=True, help="COCO layout")
    parser.add_argument("--image_size", type=int, default=640)
    parser.add_argument("--num_images", type=int, default=128, help="the first of the training split")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num_workers", type=int, default=4, help="whose memory is measured")
    parser.add_argument("--large_images", type=int, default=12)
    parser.add_argument("--large_rounds", type=int, default=2)
    parser.add_argument("--large_side", type=int, default=4000, help=argparse.SUPPRESS)
    parser.add_argument("--step_ms", type=float, help="measured time of a GPU's step (default: from its FLOPs)")
    parser.add_argument("--step_batch", type=int, help="images of that step")
    args = parser.parse_args(words)
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            parser.error(f"--{name} {value}: must be above 0")
    if args.image_size < 64:
        parser.error(f"--image_size {args.image_size}: must be at least 64")
    if (args.step_ms is None) != (args.step_batch is None):
        parser.error("--step_ms and --step_batch: give both or neither")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist")
    try:
        found = measure(args)
    except UserError as error:
        parser.error(str(error))
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
