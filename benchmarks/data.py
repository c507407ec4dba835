"""Compares the training data pipeline with those of torchvision's detection reference and of DETR, on one core.

python -m benchmarks.data --root /path/to/coco --output docs/results/data_cpu.json              (2 cores, 2 minutes)

Each pipeline turns the bytes of image files into a batch (B, 3, S, S) in memory:

pix2seq           `TrainDataset` with the default flags of train.py. Its output is uint8, which the model normalises.
torchvision       scale jitter, crop and flip with transforms.v2 on tensors, with the same range of scales, normalised
torchvision_raw   without the normalisation, which torchvision's reference leaves to its models
torchvision_pil   with the normalisation, on PIL images
detr-style        random sizes and crops of DETR on PIL images, scaled by S / 1333 except for the crop, normalised

"as_batches" is the time of a batch; "as_examples" excludes stacking, which torchvision's reference does on the device.
pix2seq resizes without antialiasing, the others with it. The record also has the results for images enlarged to
--large_side, and the times of the steps of `TrainDataset`.
"""

import argparse
import io
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes

from benchmarks.record import environment
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.data import Annotations, TrainDataset
from pix2seq.data.image_files import BadImageError, ImageFile
from pix2seq.data.image_stores import FolderStore
from pix2seq.data.loaders import collate
from pix2seq.errors import UserError
from pix2seq.training.datasets import load_data

OURS = "pix2seq"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
BATCH_SIZE = 8
NUM_PASSES = 3  # over the images, for the times of the steps

# Called with (index, round); returns pixel_values (3, S, S), image_id and labels.
Pipeline = Callable[[int, int], dict]


def load_train_set(root: str, image_size: int, num_images: int) -> TrainDataset:
    """The first images of the training split, without those that cannot be read."""
    argv = ["--root", root, "--image_size", str(image_size), "--overfit", str(num_images)]
    dataset, _ = load_data(parse(TrainArguments, argv))
    indices = []
    for index in range(len(dataset.annotations)):
        try:
            dataset.annotations.image_file(index).pixels()
        except BadImageError:
            continue
        indices.append(index)
    if not indices:
        raise UserError(f"--root {root}: none of its first {num_images} training images can be read")
    return replace(dataset, annotations=dataset.annotations.subset(indices))


def open_example(annotations: Annotations, index: int) -> tuple[Image.Image, torch.Tensor, torch.Tensor]:
    """Returns the PIL image, its boxes (xyxy in pixels) and its labels."""
    image = Image.open(io.BytesIO(annotations.store.read(annotations.locations[index]))).convert("RGB")
    boxes, labels = annotations.objects(index)
    return image, torch.from_numpy(boxes).float(), torch.from_numpy(labels)


def torchvision_pipeline(annotations: Annotations, side: int, pil: bool = False, normalize: bool = True) -> Pipeline:
    steps = [v2.RandomHorizontalFlip(), v2.ScaleJitter((side, side), (0.3, 2.0))]
    steps += [v2.RandomCrop((side, side), pad_if_needed=True), v2.SanitizeBoundingBoxes()]
    steps = [*steps, v2.ToImage()] if pil else [v2.ToImage(), *steps]
    steps += [v2.ToDtype(torch.float32, scale=True), *([v2.Normalize(**IMAGENET)] if normalize else [])]
    transform = v2.Compose(steps)

    def make_example(index: int, round_number: int) -> dict:
        image, boxes, labels = open_example(annotations, index)
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))
        example = transform({"pixel_values": image, "boxes": boxes, "labels": labels})
        return example | {"image_id": annotations.image_ids[index]}

    return make_example


def detr_pipeline(annotations: Annotations, side: int) -> Pipeline:
    short_sides = [short * side / 1333 for short in range(480, 801, 32)]

    def resize(image: Image.Image, boxes: torch.Tensor, short: float, longest: float = math.inf):
        ratio = min(short / min(image.size), longest / max(image.size))
        size = [max(1, round(length * ratio)) for length in image.size]
        scale = torch.tensor([new / old for new, old in zip(size, image.size, strict=True)] * 2)
        return image.resize(size, Image.Resampling.BILINEAR), boxes * scale

    def make_example(index: int, round_number: int) -> dict:
        image, boxes, labels = open_example(annotations, index)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([1, 0, 1, 0]) * image.width
        if random.random() < 0.5:
            image, boxes = resize(image, boxes, random.choice([400, 500, 600]))
            width, height = (random.randint(384, min(length, 600)) for length in image.size)
            left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
            image = image.crop((left, top, left + width, top + height))
            boxes = clip_boxes_to_image(boxes - torch.tensor([left, top, left, top]), (height, width))
            kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, labels = boxes[kept], labels[kept]
        image, boxes = resize(image, boxes, random.choice(short_sides), side)
        pixels = F.normalize(F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), **IMAGENET)
        padded = torch.zeros(3, side, side)
        padded[:, : image.height, : image.width] = pixels
        boxes = box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([image.width, image.height] * 2)
        return {"pixel_values": padded, "boxes": boxes, "labels": labels, "image_id": annotations.image_ids[index]}

    return make_example


def make_pipelines(dataset: TrainDataset) -> dict[str, Pipeline]:
    annotations, side = dataset.annotations, dataset.transform.image_size
    return {
        OURS: lambda index, round_number: dataset[round_number, index, 0],
        "torchvision": torchvision_pipeline(annotations, side),
        "torchvision_raw": torchvision_pipeline(annotations, side, normalize=False),
        "torchvision_pil": torchvision_pipeline(annotations, side, pil=True),
        "detr-style": detr_pipeline(annotations, side),
    }


def compare(pipelines: dict[str, Pipeline], num_images: int, rounds: int, title: str) -> dict:
    """Measures the throughput of all pipelines on the same images.

    The pipelines alternate after every batch, so that other load on the machine slows down all of them. Round 0 is a
    short warm-up.
    """
    examples, batches = ({name: [] for name in pipelines} for _ in range(2))
    for round_number in range(rounds + 1):
        order = np.random.default_rng(round_number).permutation(num_images).tolist()
        if round_number == 0:
            order = order[:BATCH_SIZE]
        seconds = {name: np.zeros(2) for name in pipelines}
        for first in range(0, len(order), BATCH_SIZE):
            for name, pipeline in pipelines.items():
                random.seed(round_number * num_images + first)
                torch.manual_seed(round_number * num_images + first)
                times = [time.perf_counter()]
                made = [pipeline(index, round_number) for index in order[first : first + BATCH_SIZE]]
                times.append(time.perf_counter())
                if name == OURS:
                    collate(made)
                else:
                    torch.stack([example["pixel_values"] for example in made])
                times.append(time.perf_counter())
                seconds[name] += np.diff(times)
        if round_number == 0:
            continue
        for name in pipelines:
            examples[name].append(seconds[name][0] / len(order))
            batches[name].append(seconds[name].sum() / len(order))
        rates = ", ".join(f"{name} {1 / values[-1]:.1f}/s" for name, values in batches.items())
        print(f"{title}, round {round_number}: {rates}")
    return {"as_batches": summarize(batches), "as_examples": summarize(examples)}


def summarize(seconds: dict[str, list[float]]) -> dict:
    """Rates and speedups, from the seconds per image of each round."""

    def spread(values: list[float]) -> dict:
        return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}

    ours, *others = seconds
    return {
        "images_per_s": {name: spread([1 / value for value in values]) for name, values in seconds.items()},
        "times_as_fast": {
            name: spread([b / a for a, b in zip(seconds[ours], seconds[name], strict=True)]) for name in others
        },
    }


def enlarge_images(dataset: TrainDataset, count: int, longest: int, folder: Path) -> TrainDataset:
    """Saves the first `count` images as JPEGs with the given longer side, and returns a dataset of them."""
    annotations = dataset.annotations.subset(range(min(count, len(dataset.annotations))))
    boxes, sizes = annotations.boxes.copy(), []
    names = [f"{index}.jpg" for index in range(len(annotations))]
    for index, name in enumerate(names):
        image = open_example(annotations, index)[0]
        size = [max(1, round(length * longest / max(image.size))) for length in image.size]
        scale = np.array([new / old for new, old in zip(size, image.size, strict=True)] * 2)
        boxes[annotations.offsets[index] : annotations.offsets[index + 1]] *= scale
        sizes.append(size[::-1])
        image.resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=90)
    store = FolderStore(folder)
    sizes = np.array(sizes, dtype=np.int32)
    annotations = replace(annotations, store=store, locations=store.locate(names)[0], sizes=sizes, boxes=boxes)
    return replace(dataset, annotations=annotations)


class TimedImageFile(ImageFile):
    """Measures the seconds of `pixels`."""

    seconds = 0.0

    def pixels(self, min_size: tuple[int, int] | None = None) -> torch.Tensor:
        started = time.perf_counter()
        pixels = super().pixels(min_size)
        self.seconds += time.perf_counter() - started
        return pixels


def time_steps(dataset: TrainDataset) -> dict[str, float]:
    """Milliseconds per image of the steps of `TrainDataset`."""
    annotations, count = dataset.annotations, len(dataset.annotations)
    seconds = np.zeros(4)
    started = time.perf_counter()
    for epoch in range(NUM_PASSES):
        for index in range(count):
            rng = np.random.default_rng((dataset.seed, epoch, index, 0))
            boxes, labels = annotations.objects(index)
            size = tuple(annotations.sizes[index].tolist())
            times = [time.perf_counter()]
            data = annotations.store.read(annotations.locations[index])
            times.append(time.perf_counter())
            file = TimedImageFile(data, size if min(size) > 0 else None)
            times.append(time.perf_counter())
            padded = dataset.transform(file, boxes, rng)
            times.append(time.perf_counter())
            dataset.sequence_builder(padded.boxes, labels[padded.kept], rng, padded.valid_fraction)
            times.append(time.perf_counter())
            seconds += np.diff(times) + np.array([0, file.seconds, -file.seconds, 0])
    total = time.perf_counter() - started
    names = ("read", "decode", "resize, crop, flip, pad", "sequence", "rest", "all")
    ms = 1000 / (NUM_PASSES * count) * np.array([*seconds, total - seconds.sum(), total])
    return dict(zip(names, ms.tolist(), strict=True))


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    dataset = load_train_set(args.root, args.image_size, args.num_images)
    annotations, count = dataset.annotations, len(dataset.annotations)
    comparison = compare(make_pipelines(dataset), count, args.rounds, f"{count} images")
    with tempfile.TemporaryDirectory() as folder:
        large = enlarge_images(dataset, args.large_images, args.large_side, Path(folder))
        num_large, title = len(large.annotations), f"{args.large_side} pixels"
        large_comparison = compare(make_pipelines(large), num_large, args.large_rounds, title)
    num_bytes = [len(annotations.store.read(location)) for location in annotations.locations]
    return {
        "environment": environment(torch.device("cpu")),
        "flags": {name: value for name, value in vars(args).items() if name not in ("output", "root")},
        "images": {
            "count": count,
            "objects_per_image": int(annotations.trainable.sum()) / count,
            "mean_kb": statistics.mean(num_bytes) / 1000,
            "mean_megapixels": float(np.prod(annotations.sizes, axis=1).mean()) / 1e6,
        },
        **comparison,
        "large_images": {"count": num_large, "long_side": args.large_side, **large_comparison},
        "ms_per_image": time_steps(dataset),
    }


def format_report(record: dict) -> str:
    large = record["large_images"]
    sections = {
        "as batches": record["as_batches"],
        "as examples": record["as_examples"],
        f"{large['long_side']} pixels, as batches": large["as_batches"],
    }
    lines = []
    for title, comparison in sections.items():
        for name, rate in comparison["images_per_s"].items():
            line = f"{title}: {name:16}{rate['median']:8.1f} images/s on one core"
            if name != OURS:
                line += "; pix2seq is {median:.2f} ({min:.2f} to {max:.2f}) times as fast".format(
                    **comparison["times_as_fast"][name]
                )
            lines.append(line)
    lines.append("ms per image: " + ", ".join(f"{step} {ms:.2f}" for step, ms in record["ms_per_image"].items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare the training data pipeline with two others.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--root", required=True, help="dataset in COCO layout")
    parser.add_argument("--image_size", type=int, default=640, help="side of the padded image, at least 64")
    parser.add_argument("--num_images", type=int, default=128, help="number of training images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--large_images", type=int, default=12, help="number of enlarged images")
    parser.add_argument("--large_rounds", type=int, default=2)
    parser.add_argument("--large_side", type=int, default=4000, help="longer side of enlarged images in pixels")
    args = parser.parse_args(argv)
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    try:
        record = measure(args)
    except UserError as error:
        parser.error(str(error))
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(format_report(record))


if __name__ == "__main__":
    main()
