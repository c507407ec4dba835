"""YOLO: a data.yaml, and a text file of boxes for each image.

hotcoco 1.3 reads it too, but refuses polygons, and drops images without a label file and the endings of all names.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from pix2seq.data.convert.files import SUFFIXES, Classes, SourceImage, absolute, read_lines, read_text, upright_size
from pix2seq.errors import UserError
from pix2seq.progress import progress


def read_yolo(config: Path) -> tuple[dict[str, list[SourceImage]], Classes]:
    try:
        content = yaml.load(
            read_text(config), Loader=yaml.BaseLoader
        )  # all scalars are strings: no is a name, not False
    except yaml.YAMLError as error:
        raise UserError(f"{config}: is not YAML ({error})") from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not (names and isinstance(names, dict) and all(isinstance(name, str) for name in names.values())):
        raise UserError(f"{config}: names must be a list of class names, or class numbers with names")
    try:
        categories = {int(index): (int(index) + 1, name) for index, name in names.items()}
    except ValueError:
        raise UserError(f"{config}: names has a class number that is not a whole one: {', '.join(names)}") from None
    keypoints = _numbers_of_keypoints(config, content)
    splits = {}
    for name, keys in {"train": ["train"], "val": ["val", "valid"], "test": ["test"]}.items():
        key = next((key for key in keys if content.get(key)), None)
        if key is None:
            continue
        entries = content[key] if isinstance(content[key], list) else [content[key]]
        paths = list(dict.fromkeys(path for entry in entries for path in _yolo_pictures(config, content, key, entry)))
        labels = [_label_file(path) for path in paths]
        if not paths:
            raise UserError(f"{config}: {key}: no pictures in {entries[0]}")
        if name != "test" and not any(label.is_file() for label in labels):
            raise UserError(f"{config}: {key}: not one picture has a label file; the first would be {labels[0]}")
        splits[name] = [
            _yolo_picture(path, label, categories, keypoints)
            for path, label in zip(progress(paths, f"reading {name}"), labels, strict=True)
        ]
    if not splits:
        raise UserError(f"{config}: has none of train, val and test")
    return splits, categories


def _yolo_pictures(config: Path, content: dict, key: str, entry: str) -> Iterator[Path]:
    """The pictures of a folder, at any depth, or those that a list names."""
    # `path` is often that of another machine. Roboflow writes ../train/images and means train/images.
    roots = [config.parent / str(content.get("path", "")), config.parent]
    stripped = str(entry)
    while stripped.startswith("../"):
        stripped = stripped[3:]
    candidates = [root / str(entry) for root in roots] + [config.parent / stripped]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise UserError(
            f"{config}: {key}: {entry} is neither under {' nor under '.join(map(str, dict.fromkeys(roots)))}"
        )
    if found.is_dir():
        seen = set()  # links may lead back to where they are
        for folder, folders, names in os.walk(found, followlinks=True):
            seen.add(os.path.realpath(folder))
            folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(folder, f)) not in seen)
            images = [n for n in sorted(names) if Path(n).suffix.lower() in SUFFIXES and not n.startswith(".")]
            yield from (absolute(Path(folder, name)) for name in images)
        return
    for number, line in read_lines(found):
        candidates = [root / line for root in (found.parent, *roots)]
        picture = next((path for path in candidates if path.is_file()), None)
        if picture is None:
            raise UserError(f"{found}:{number}: there is no picture {line}")
        yield absolute(picture)


def _label_file(picture: Path) -> Path:
    """Where ultralytics looks for it: under labels/ in place of the last images/, or else beside the picture."""
    before, images, after = picture.as_posix().rpartition("/images/")
    return Path(f"{before}/labels/{after}" if images else after).with_suffix(".txt")


def _numbers_of_keypoints(config: Path, content: dict) -> int:
    """How many numbers follow a box, in datasets of poses: kpt_shape is [points, numbers of each]."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    try:
        points, numbers = map(int, shape)
    except (TypeError, ValueError):
        raise UserError(f"{config}: kpt_shape {shape}: must be two whole numbers") from None
    return points * numbers


def _yolo_picture(path: Path, label: Path, categories: Classes, keypoints: int) -> SourceImage:
    width, height = size = upright_size(path)
    objects = []
    for number, line in read_lines(label) if label.is_file() else ():
        try:
            index, *values = map(float, line.split())
        except ValueError:
            index, values = math.nan, []
        if keypoints:
            values = values[:4] if len(values) == 4 + keypoints else []
        if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)) or not all(
            map(math.isfinite, [index, *values])
        ):
            raise UserError(
                f"{label}:{number}: needs a class and four finite numbers, or three points or more: {line[:80]}"
            )
        if index not in categories:
            raise UserError(f"{label}:{number}: class {line.split()[0]} is none of {', '.join(map(str, categories))}")
        if len(values) == 4:
            x, y, w, h = values
            x, y = x - w / 2, y - h / 2
        else:
            x, y = min(values[::2]), min(values[1::2])
            w, h = max(values[::2]) - x, max(values[1::2]) - y
        objects.append((int(index), (x * width, y * height, w * width, h * height)))
    return SourceImage(path, size, objects)
