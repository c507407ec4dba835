"""Reads YOLO datasets: a data.yaml, and a text file of boxes for each image."""

import math
import re
from pathlib import Path

import yaml

from pix2seq.argument_parser import UniqueKeyLoader
from pix2seq.data.convert.source_folder import Classes, SourceFolder, SourceImage, absolute
from pix2seq.errors import UserError
from pix2seq.progress import progress

EMPTY_VALUES: tuple = ("", "~", "null", "Null", "NULL", [])


class _TextLoader(UniqueKeyLoader):
    """Reads all scalars as strings: the class name `no` is not False."""


_TextLoader.yaml_implicit_resolvers = {}


def read_yolo(config: Path, source: SourceFolder) -> tuple[dict[str, list[SourceImage]], Classes]:
    """Reads the splits train, val and test of a YOLO dataset.

    Class k gets category id k + 1. An image without a label file has no objects. A polygon becomes the box around it.

    Args:
        config: The data.yaml.
        source: Folder of the dataset.

    Returns:
        The images of each split, and the classes.

    Raises:
        UserError: A file cannot be read; the message names it, with the line.
    """
    try:
        content = yaml.load(source.read_text(config), Loader=_TextLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{config}: is not YAML ({' '.join(str(error).split())})") from None
    classes = _read_classes(config, content)
    if "kpt_shape" in content:
        raise UserError(f"{config}: kpt_shape: keypoint labels are not supported; write labels of boxes or polygons")
    splits = {}
    for name in ("train", "val", "test"):
        if content.get(name, "") not in EMPTY_VALUES:
            labels = _find_labels(config, source, content, name)
            items = progress(labels.items(), f"reading {name}")
            splits[name] = [_read_image(source, path, label, classes) for path, label in items]
    if not splits:
        raise UserError(f"{config}: has none of train, val and test")
    return splits, classes


def _read_classes(config: Path, content: dict) -> Classes:
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not (names and isinstance(names, dict) and all(isinstance(name, str) for name in names.values())):
        raise UserError(f"{config}: names must be a list of class names, or class numbers with names")
    try:
        return {int(index): (int(index) + 1, name) for index, name in names.items()}
    except ValueError:
        raise UserError(f"{config}: names: class numbers must be whole numbers, not {', '.join(names)}") from None


def _find_labels(config: Path, source: SourceFolder, content: dict, split: str) -> dict[Path, Path | None]:
    """Returns the images of a split with their label files, None where there is none."""
    entries = content[split] if isinstance(content[split], list) else [content[split]]
    # Datasets often come with the `path` of another machine. Roboflow writes ../train/images for train/images.
    roots = list(dict.fromkeys([config.parent / str(content.get("path", "")), config.parent]))
    images: dict[Path, None] = {}
    for entry in map(str, entries):
        candidates = [absolute(root / entry) for root in roots]
        candidates.append(absolute(config.parent / re.sub(r"^(\.\./)+", "", entry)))
        existing = [path for path in candidates if path.exists()]
        if not existing:
            raise UserError(f"{config}: {split}: {entry} is not in {' or '.join(map(str, roots))}")
        path = min(existing, key=lambda path: not source.contains(path))
        images |= dict.fromkeys(source.list_images(path) if path.is_dir() else _read_list(source, path, roots))
    if not images:
        raise UserError(f"{config}: {split}: no images in {entries[0]}")
    labels = {path: label if (label := _label_path(path)).is_file() else None for path in images}
    used = {label for label in labels.values() if label is not None}
    if not used and split != "test":
        first = _label_path(next(iter(images)))
        raise UserError(f"{config}: {split}: no image has a label file; the first would be {first}")
    text_files = {file for folder in {label.parent for label in used} for file in folder.glob("*.txt")}
    # Lists of classes and of images may stand beside the labels.
    unused = {file for file in text_files - used if file.stem not in ("classes", *content)}
    unlabeled = [path for path, label in labels.items() if label is None]
    source.note_omitted(f"images of {split} have no label file and so no objects", unlabeled)
    source.note_omitted(f"label files of {split} have no image", unused)
    return labels


def _read_list(source: SourceFolder, file: Path, roots: list[Path]) -> list[Path]:
    """Reads a file that lists images."""
    images = []
    for number, line in source.read_lines(file):
        existing = [path for root in (file.parent, *roots) if (path := root / line).is_file()]
        if not existing:
            raise UserError(f"{file}:{number}: no such image: {line}")
        images.append(absolute(existing[0]))
    return images


def _label_path(image: Path) -> Path:
    """Replaces the last /images/ by /labels/, as ultralytics does; without one, labels are beside the images."""
    before, images, after = image.as_posix().rpartition("/images/")
    return Path(f"{before}/labels/{after}" if images else after).with_suffix(".txt")


def _read_image(source: SourceFolder, path: Path, label_file: Path | None, classes: Classes) -> SourceImage:
    width, height = size = source.image_size(path)
    objects = []
    for number, line in source.read_lines(label_file) if label_file else ():
        try:
            index, *values = map(float, line.split())
        except ValueError:
            index, values = math.nan, []
        is_polygon = len(values) >= 6 and len(values) % 2 == 0
        if not ((len(values) == 4 or is_polygon) and all(map(math.isfinite, [index, *values]))):
            requirement = "a class and four finite numbers, or three or more points, are required"
            raise UserError(f"{label_file}:{number}: {requirement}: {line[:80]}")
        if index not in classes:
            known = ", ".join(map(str, classes))
            raise UserError(f"{label_file}:{number}: class {line.split()[0]} is not one of {known}")
        if is_polygon:
            x, y = min(values[::2]), min(values[1::2])
            w, h = max(values[::2]) - x, max(values[1::2]) - y
        else:
            x, y, w, h = values
            x, y = x - w / 2, y - h / 2
        objects.append((int(index), (x * width, y * height, w * width, h * height)))
    return SourceImage(path, size, objects)
