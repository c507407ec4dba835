"""YOLO: a data.yaml, and a text file of boxes for each image.

hotcoco 1.3 reads it too, but refuses polygons, and drops images without a label file and the endings of all names.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from pix2seq.data.convert.files import (
    Classes,
    Source,
    SourceImage,
    absolute,
    read_text,
)
from pix2seq.errors import UserError
from pix2seq.progress import progress

NOTHING = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.BaseLoader):
    """All scalars are strings: no is a name, not False. And no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        if twice := [key for key, count in Counter(map(str, keys)).items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yolo(config: Path, source: Source) -> tuple[dict[str, list[SourceImage]], Classes]:
    try:
        content = yaml.load(read_text(source.own(config)), Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{config}: is not YAML ({' '.join(str(error).split())})") from None
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
        given = [key for key in keys if content.get(key, "") not in (*NOTHING, [])]
        if not given:
            continue
        key, *others = given
        if others:
            source.tell(f"{config}: {others[0]} is left out: there is {key}")
        paths, labels = _find(config, source, content, key, name != "test")
        splits[name] = [
            _yolo_picture(source, path, labels.get(path), categories, keypoints)
            for path in progress(paths, f"reading {name}")
        ]
    if not splits:
        raise UserError(f"{config}: has none of train, val and test")
    return splits, categories


def _find(
    config: Path, source: Source, content: dict, key: str, needs_labels: bool
) -> tuple[list[Path], dict[Path, Path]]:
    """The pictures of a split, and the label files of those that have one."""
    entries = content[key] if isinstance(content[key], list) else [content[key]]
    found = (path for entry in entries for path in _pictures(config, source, content, key, entry))
    paths = list(dict.fromkeys(found))
    if not paths:
        raise UserError(f"{config}: {key}: no pictures in {entries[0]}")
    labels = {path: label for path in paths if (label := _label_file(path)).is_file()}
    if needs_labels and not labels:
        first = _label_file(paths[0])
        raise UserError(f"{config}: {key}: not one picture has a label file; the first would be {first}")
    used = set(labels.values())
    # What lists pictures or classes may lie there too.
    others = {file for folder in {label.parent for label in used} for file in folder.glob("*.txt")} - used
    others = {file for file in others if file.stem not in ("classes", *content)}
    source.left_out(f"pictures of {key} have no label file, and so no objects", set(paths) - set(labels))
    source.left_out(f"label files of {key} have no picture", others)
    return paths, labels


def _pictures(config: Path, source: Source, content: dict, key: str, entry: str) -> Iterator[Path]:
    """The pictures of a folder, at any depth, or those that a list names."""
    # `path` is often that of another machine. Roboflow writes ../train/images and means train/images.
    roots = [config.parent / str(content.get("path", "")), config.parent]
    stripped = str(entry)
    while stripped.startswith("../"):
        stripped = stripped[3:]
    candidates = [absolute(root / str(entry)) for root in roots] + [absolute(config.parent / stripped)]
    there = [path for path in candidates if path.exists()]
    found = next((path for path in there if source.holds(path)), there[0] if there else None)
    if found is None:
        raise UserError(
            f"{config}: {key}: {entry} is neither under {' nor under '.join(map(str, dict.fromkeys(roots)))}"
        )
    if found.is_dir():
        yield from source.pictures(found)
        return
    for number, line in source.lines(found):
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


def _yolo_picture(source: Source, path: Path, label: Path | None, categories: Classes, keypoints: int) -> SourceImage:
    width, height = size = source.size(path)
    objects = []
    for number, line in source.lines(label) if label else ():
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
