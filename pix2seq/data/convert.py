"""YOLO and Pascal VOC datasets as COCO annotation files. No picture is copied, moved or changed.

Both are read here and not with a library. hotcoco 1.3 refuses polygons in YOLO files and drops pictures without a
label file and the endings of all names; of VOC it cuts class names at an &amp;, takes XML that ends halfway for whole
and makes crowds of difficult objects. Neither tells the line of a fault in an XML file, nor minds a coordinate NaN.
"""

import glob
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PureWindowsPath
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import yaml
from PIL import Image

from pix2seq.errors import UserError
from pix2seq.progress import progress

# What the "info" of a file written here says; any other file is somebody's and is not overwritten.
MARKER = "converted by pix2seq"

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Converted:
    """A split that was written: its name (train, val, ...), where its pictures lie, and its annotation file."""

    name: str
    images: Path
    json: Path
    num_images: int
    num_objects: int


@dataclass(frozen=True)
class _Picture:
    """size is (width, height); objects are (class, xywh in pixels), with classes as they are called in the dataset."""

    path: Path
    size: tuple[int, int]
    objects: list[tuple[int | str, tuple[float, float, float, float]]]


# From a class as it is called in the dataset, a number or a name, to COCO's id and name.
_Categories = dict[int | str, tuple[int, str]]


def convert(source: str | Path, output: str | Path) -> list[Converted]:
    """Writes output/annotations/instances_{train,val,...}2017.json for each split of the dataset at `source`.

    A folder with a data.yaml is a YOLO dataset. One with Annotations/, JPEGImages/ and, for the splits,
    ImageSets/Main/ is Pascal VOC, and so is one with XML files beside the pictures, in train/, valid/ and test/ or
    directly. Class ids are the same in all splits. File names are relative to `Converted.images`, the folder that
    holds the split's pictures, at whatever depth. Boxes are neither rounded nor clipped. Raises UserError, and then
    no file of another origin has been touched.

    YOLO: class k gets id k + 1. A picture without a label file has no objects. Polygons become the boxes around them.

    VOC: ids follow labels.txt or else the sorted names. The corners are pixels counted from 1 and both in the box, so
    xmin = 1 is x = 0 and the width is xmax - xmin + 1. Objects marked difficult are kept as ordinary ones. A picture
    without an XML file was not annotated and is left out. trainval is a split of its own beside a train list, and
    else it is train.
    """
    source, output = _absolute(source), _absolute(output)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    config = next((source / name for name in ("data.yaml", "data.yml") if (source / name).is_file()), None)
    splits, categories = _read_voc(source) if config is None else _read_yolo(config)
    targets = {name: output / "annotations" / f"instances_{name}2017.json" for name in splits}
    for target in targets.values():
        if target.exists() and not _is_ours(target):
            raise UserError(f"{target}: is there and was not written by a conversion; choose another folder")
    return [_write(name, pictures, categories, targets[name]) for name, pictures in splits.items()]


def _write(name: str, pictures: list[_Picture], categories: _Categories, target: Path) -> Converted:
    folder = Path(os.path.commonpath([picture.path.parent for picture in pictures]))
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, start=1):
        (width, height), file_name = picture.size, picture.path.relative_to(folder).as_posix()
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for label, box in picture.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": categories[label][0],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": MARKER},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in categories.values()],
    }
    unfinished = target.with_suffix(".unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content))
        os.replace(unfinished, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return Converted(name, folder, target, len(images), len(annotations))


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["info"]["description"] == MARKER
    except (OSError, ValueError, LookupError, TypeError):
        return False


# -- YOLO ------------------------------------------------------------------------------------------


def _read_yolo(config: Path) -> tuple[dict[str, list[_Picture]], _Categories]:
    try:
        content = yaml.load(_text(config), Loader=yaml.BaseLoader)  # all scalars are strings: no is a name, not False
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
            _yolo_picture(path, label, categories)
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
        for path in sorted(glob.glob(os.path.join(glob.escape(str(found)), "**", "*.*"), recursive=True)):
            if Path(path).suffix.lower() in _SUFFIXES:
                yield _absolute(path)
        return
    for number, line in _lines(found):
        candidates = [root / line for root in (found.parent, *roots)]
        picture = next((path for path in candidates if path.is_file()), None)
        if picture is None:
            raise UserError(f"{found}:{number}: there is no picture {line}")
        yield _absolute(picture)


def _label_file(picture: Path) -> Path:
    """Where ultralytics looks for it: under labels/ in place of the last images/, or else beside the picture."""
    before, images, after = picture.as_posix().rpartition("/images/")
    return Path(f"{before}/labels/{after}" if images else after).with_suffix(".txt")


def _yolo_picture(path: Path, label: Path, categories: _Categories) -> _Picture:
    width, height = size = _upright_size(path)
    objects = []
    for number, line in _lines(label) if label.is_file() else ():
        try:
            index, *values = map(float, line.split())
        except ValueError:
            index, values = math.nan, []
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
    return _Picture(path, size, objects)


# -- Pascal VOC ------------------------------------------------------------------------------------


def _read_voc(source: Path) -> tuple[dict[str, list[_Picture]], _Categories]:
    splits = _voc_splits(source)
    if not any(splits.values()):
        raise UserError(
            f"{source}: is neither YOLO (data.yaml) nor Pascal VOC (Annotations/*.xml and JPEGImages/, or XML files "
            "beside the pictures, there or in train/, valid/, test/)"
        )
    classes = source / "labels.txt"
    known = list(dict.fromkeys(line for _, line in _lines(classes))) if classes.is_file() else None
    listings: dict[Path, dict[str, list[str]]] = {}
    pictures: dict[Path, _Picture] = {}
    owners: dict[Path, Path] = {}
    for xml, folder in progress(dict.fromkeys(chain(*splits.values())), "reading"):
        if folder not in listings:
            listings[folder] = _names_by_stem(folder)
        picture = pictures[xml] = _voc_picture(xml, folder, listings[folder])
        if owners.setdefault(picture.path, xml) != xml:
            raise UserError(f"{xml}: is about {picture.path}, and so is {owners[picture.path]}")
    used = {name for picture in pictures.values() for name, _ in picture.objects}
    if known is not None and (unknown := used - set(known)):
        first = next(xml for xml, picture in pictures.items() if unknown & {name for name, _ in picture.objects})
        raise UserError(f"{first}: the class {min(unknown)} is not in {classes}")
    if not used:
        raise UserError(f"{source}: there is no object in any of its XML files")
    names = known or sorted(used)
    return (
        {name: [pictures[xml] for xml, _ in pairs] for name, pairs in splits.items()},
        {name: (index, name) for index, name in enumerate(names, start=1)},
    )


def _voc_splits(source: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Of each split the XML files, each with the folder its picture is in."""
    annotations, pictures, lists = source / "Annotations", source / "JPEGImages", source / "ImageSets" / "Main"
    if not annotations.is_dir():
        splits = {}
        for name, folder in (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test"), ("train", ".")):
            files = sorted((source / folder).glob("*.xml"))
            if files and name not in splits and not (folder == "." and splits):
                splits[name] = [(xml, xml.parent) for xml in files]
        return splits
    if not pictures.is_dir():
        raise UserError(f"{pictures}: no such folder, though there is {annotations}")
    splits = {}
    for name in ("train", "val", "trainval", "test"):
        if (lists / f"{name}.txt").is_file():
            files = {annotations / f"{line}.xml": number for number, line in _lines(lists / f"{name}.txt")}
            for xml, number in files.items():
                if not xml.is_file():
                    raise UserError(f"{lists / name}.txt:{number}: there is no {xml}")
            if files:
                splits[name] = list(files)
    if not splits:
        splits["train"] = sorted(annotations.glob("*.xml"))
    elif "train" not in splits and "trainval" in splits:
        splits["train"] = splits.pop("trainval")
    return {
        name: [(xml, pictures / xml.parent.relative_to(annotations)) for xml in files]
        for name, files in splits.items()
    }


def _names_by_stem(folder: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in _SUFFIXES:
            names.setdefault(stem, []).append(name)
    return names


def _voc_picture(xml: Path, folder: Path, names: dict[str, list[str]]) -> _Picture:
    root = _read_xml(xml)
    if root.tag != "annotation":
        raise UserError(f"{xml}: is not Pascal VOC: it holds <{root.tag}> and not <annotation>")
    # <filename> outlives the renaming of a picture, and comes with foreign folders or without its ending.
    said = PureWindowsPath(root.findtext("filename", "").strip()).name
    candidates = names.get(xml.stem, [])
    if len(candidates) != 1:
        candidates = [said] if (folder / said).is_file() and said else names.get(said, candidates)
    if len(candidates) != 1:
        raise UserError(
            f"{xml}: {'no' if not candidates else 'more than one'} picture {xml.stem} or {said} in {folder}"
        )
    path = folder / candidates[0]
    # The size that the boxes were drawn on, which for a picture that EXIF turns may be either.
    size = tuple(_number(root.find(f"size/{side}")) for side in ("width", "height"))
    if not all(value >= 1 and value.is_integer() for value in size):
        size = _upright_size(path)
    objects = []
    for entry in root.findall("object"):
        name = entry.findtext("name", "").strip()
        x1, y1, x2, y2 = (_number(entry.find(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax"))
        box = (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
        if not (name and all(map(math.isfinite, box))):
            raise UserError(
                f"{xml}:{entry.get('line')}: an object needs a <name> and a <bndbox> of four finite numbers"
            )
        objects.append((name, box))
    return _Picture(path, (int(size[0]), int(size[1])), objects)


def _number(element: Element | None) -> float:
    """NaN for what is no number."""
    try:
        return float(element.text)
    except (AttributeError, TypeError, ValueError):
        return math.nan


def _read_xml(path: Path) -> Element:
    """The root. Every element has its line as attribute `line`."""
    builder, parser = TreeBuilder(), expat.ParserCreate()

    def refuse(*_) -> None:  # it is where entities come from, which can unfold to gigabytes
        raise UserError(f"{path}:{parser.CurrentLineNumber}: a DOCTYPE is not allowed")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda tag, _: builder.start(tag, {"line": str(parser.CurrentLineNumber)})
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(_bytes(path), True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that does not exist
        raise UserError(f"{path}:{parser.CurrentLineNumber}: is not XML ({error})") from None
    return builder.close()


# -- files -----------------------------------------------------------------------------------------


def _upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from its header."""
    try:
        with Image.open(path) as image:
            turned = image.format in ("JPEG", "MPO") and image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _text(path: Path) -> str:
    content = _bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, with their numbers."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))
