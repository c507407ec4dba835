"""The shapes dataset: colored shapes on noisy backgrounds, in COCO's layout, for demonstrations and tests.

The same arguments always draw the same images. The training and validation images have different random streams, so
no image is in both. Some shapes overlap, and some images are empty.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pix2seq.argument_parser import LineErrorParser, path, run_command
from pix2seq.data.rich_shapes import KINDS, draw_rich_image
from pix2seq.errors import UserError
from pix2seq.output_paths import prepare_output_folder, report_write_errors
from pix2seq.progress import progress

SHAPES = ("ellipse", "rectangle", "triangle", "cross")
# Not 1 to 4: ids of real annotation files have gaps, too.
CATEGORY_IDS = (1, 3, 7, 11)

_COLORS = ((230, 60, 50), (60, 170, 70), (60, 100, 230), (240, 200, 40), (190, 70, 210), (40, 200, 210))
_SUPERSAMPLING = 2
_MINIMUM = {"num_train": 1, "num_val": 1, "max_shapes": 1, "seed": 0}


@dataclass(frozen=True)
class Style:
    """A kind of drawings.

    Args:
        draw_image: Draws an image from a random generator, its size and the largest number of objects.
        kinds: Class names.
        category_ids: Their category ids.
        size: Default side of the images in pixels.
        min_size: Smallest side.
        max_shapes: Default of the largest number of objects in an image.
        extension: File name extension, which determines the image format.
    """

    draw_image: Callable
    kinds: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: int
    min_size: int
    max_shapes: int
    extension: str


def draw_dataset(
    folder: str | Path,
    num_train: int = 8000,
    num_val: int = 200,
    size: int | None = None,
    max_shapes: int | None = None,
    seed: int = 0,
    style: str = "plain",
) -> Path:
    """Draws images/{train,val}2017 and annotations/instances_{train,val}2017.json.

    An identical dataset is kept, another dataset of shapes is replaced.

    Args:
        folder: Folder to write to.
        num_train: Number of training images.
        num_val: Number of validation images.
        size: Side of the images in pixels. Default: that of the style.
        max_shapes: Largest number of objects in an image. Default: that of the style.
        seed: Seed of the random generator.
        style: One of `STYLES`: "plain", or "rich", see `rich_shapes`.

    Returns:
        The folder.

    Raises:
        UserError: A number is too small, or the folder cannot be written to or has files that are not of a shapes
            dataset.
    """
    if style not in STYLES:
        raise UserError(f"--style {style}: must be one of {', '.join(STYLES)}")
    folder, drawn = Path(folder), STYLES[style]
    size, max_shapes = drawn.size if size is None else size, drawn.max_shapes if max_shapes is None else max_shapes
    recipe: dict = {"num_train": num_train, "num_val": num_val, "size": size, "max_shapes": max_shapes, "seed": seed}
    for name, value in recipe.items():
        minimum = drawn.min_size if name == "size" else _MINIMUM[name]
        if value < minimum:
            raise UserError(f"--{name} {value}: must be at least {minimum}")
    recipe |= {} if style == "plain" else {"style": style}
    recipe_file = folder / "shapes.json"
    with report_write_errors(folder, "folder"):
        if _read_recipe(recipe_file) == recipe:
            return folder
        prepare_output_folder(folder, "folder")
        if not recipe_file.exists() and any(folder.iterdir()):
            raise UserError(f"folder {folder}: is not empty and has no shapes dataset; name another folder")
        recipe_file.write_text("null")  # an unfinished dataset
        for stream, (split, count) in enumerate((("train", num_train), ("val", num_val))):
            _draw_split(folder, split, count, size=size, max_shapes=max_shapes, seeds=(seed, stream), style=drawn)
        recipe_file.write_text(json.dumps(recipe))
    return folder


def _read_recipe(file: Path) -> dict | None:
    """Reads the arguments of an earlier call, None if there are none."""
    try:
        return json.loads(file.read_bytes()) if file.exists() else None
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); delete its folder or name another") from None


def _draw_split(
    folder: Path, split: str, num_images: int, *, size: int, max_shapes: int, seeds: tuple[int, int], style: Style
) -> None:
    images_folder = folder / "images" / f"{split}2017"
    images_folder.mkdir(parents=True, exist_ok=True)
    for old in images_folder.glob("[0-9]" * 6 + ".*"):  # of an earlier dataset, which may have more images
        if old.suffix in (".png", ".jpg"):
            old.unlink()
    images: list[dict] = []
    annotations: list[dict] = []
    for index in progress(range(num_images), f"drawing {split}"):
        image, objects = style.draw_image(np.random.default_rng((*seeds, index)), size, max_shapes)
        file_name = f"{index:06d}.{style.extension}"
        image.save(images_folder / file_name, quality=90)
        images.append({"id": index + 1, "file_name": file_name, "width": size, "height": size})
        for label, (x1, y1, x2, y2) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": style.category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in zip(style.category_ids, style.kinds, strict=True)]
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


def draw_image(
    rng: np.random.Generator, size: int, max_shapes: int
) -> tuple[Image.Image, list[tuple[int, tuple[float, float, float, float]]]]:
    """Draws an image. About one image in twenty is empty.

    Args:
        rng: Random generator.
        size: Side of the image in pixels.
        max_shapes: Largest number of objects.

    Returns:
        The image, and (label, (x1, y1, x2, y2) in pixels) of each object.
    """
    low, high = sorted(rng.integers(0, 256, 2))
    background = rng.integers(low, high + 1, 3) + rng.normal(0, 12, (size, size, 3))
    image = Image.fromarray(np.clip(background, 0, 255).astype(np.uint8))
    image = image.resize((size * _SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    objects: list[tuple[int, tuple[float, float, float, float]]] = []
    count = 0 if rng.random() < 0.05 else int(rng.integers(1, max_shapes + 1))
    for _ in range(count):
        box = _place_box(rng, size, [other for _, other in objects])
        if box is None:
            continue
        label = int(rng.integers(len(SHAPES)))
        color = tuple(np.clip(np.array(_COLORS[rng.integers(len(_COLORS))]) + rng.integers(-20, 21, 3), 0, 255))
        _draw_shape(draw, SHAPES[label], [v * _SUPERSAMPLING for v in box], tuple(int(c) for c in color))
        objects.append((label, box))
    return image.resize((size, size), Image.Resampling.BOX), objects


def _place_box(rng: np.random.Generator, size: int, others: list) -> tuple[float, float, float, float] | None:
    """Draws a box that overlaps the others by less than 15 % of their areas; None after 20 attempts."""
    for _ in range(20):
        width, height = (float(v) for v in rng.uniform(0.2, 0.5, 2) * size)
        if max(width, height) > 1.5 * min(width, height):
            continue
        x, y = float(rng.uniform(0, size - width)), float(rng.uniform(0, size - height))
        x1, y1, x2, y2 = (round(v * 2) / 2 for v in (x, y, x + width, y + height))
        area = (x2 - x1) * (y2 - y1)
        if all(_intersection((x1, y1, x2, y2), other) < 0.15 * min(area, _area(other)) for other in others):
            return x1, y1, x2, y2
    return None


def _area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _intersection(a, b) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _draw_shape(draw: ImageDraw.ImageDraw, name: str, box, color) -> None:
    x1, y1, x2, y2 = box[0], box[1], box[2] - 1, box[3] - 1  # Pillow's coordinates are inclusive
    if name == "ellipse":
        draw.ellipse((x1, y1, x2, y2), fill=color)
    elif name == "rectangle":
        draw.rectangle((x1, y1, x2, y2), fill=color)
    elif name == "triangle":
        draw.polygon([((x1 + x2) / 2, y1), (x1, y2), (x2, y2)], fill=color)
    elif name == "cross":
        third_x, third_y = (x2 - x1) / 3, (y2 - y1) / 3
        draw.rectangle((x1 + third_x, y1, x2 - third_x, y2), fill=color)
        draw.rectangle((x1, y1 + third_y, x2, y2 - third_y), fill=color)


STYLES = {
    "plain": Style(draw_image, SHAPES, CATEGORY_IDS, size=64, min_size=8, max_shapes=4, extension="png"),
    "rich": Style(
        draw_rich_image, KINDS, tuple(range(1, 1 + len(KINDS))), size=256, min_size=96, max_shapes=18, extension="jpg"
    ),
}


def main(argv: list[str] | None = None, program: str = "pix2seq shapes") -> int:
    """Parses the command line and draws the dataset; returns the exit code."""
    parser = LineErrorParser(prog=program, description="Draw the shapes dataset as a COCO-layout folder.")
    parser.add_argument("folder", type=path, help="folder to write to")
    parser.add_argument("--num_train", type=int, default=8000, help="number of training images")
    parser.add_argument("--num_val", type=int, default=200, help="number of validation images")
    parser.add_argument("--style", choices=STYLES, default="plain", help="rich: textures, occlusion, many objects")
    parser.add_argument("--size", type=int, help="side of an image in pixels (default: 64; rich: 256)")
    parser.add_argument("--max_shapes", type=int, help="largest number of objects in an image (default: 4; rich: 18)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random generator")
    return run_command(run_shapes, parser.parse_args(argv), program=program)


def run_shapes(args: argparse.Namespace) -> int:
    """Draws the dataset and prints its folder; returns the exit code."""
    print(draw_dataset(**vars(args)))
    return 0
