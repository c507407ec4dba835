"""COCO annotation files, read and checked: arrays for training, and the file itself for scoring.

What is wrong with a file is said in one line that names it, before any work is done with it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pix2seq.errors import UserError


@dataclass(frozen=True)
class Split:
    """Where one split of a dataset lies: a folder of images and its COCO annotation file."""

    images: Path
    json: Path


def coco_split(root: str | Path, name: str) -> Split:
    """Finds `name` (train or val) under a COCO root: images/{name}2017 or, as the archives unpack, {name}2017."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    annotations = root / "annotations" / f"instances_{name}2017.json"
    if not annotations.is_file():
        raise UserError(f"--root {root}: annotations/{annotations.name} is missing")
    for images in (root / "images" / f"{name}2017", root / f"{name}2017"):
        if images.is_dir():
            return Split(images, annotations)
    raise UserError(f"--root {root}: neither images/{name}2017 nor {name}2017 is a folder")


def find_split(name: str, root: str | None, images: str | None, json: str | None) -> Split:
    """One split by the flags that name a dataset: `name` (train or val) under a root, or folder and file."""
    return coco_split(root, name) if root is not None else Split(Path(images), Path(json))


@dataclass(frozen=True)
class Categories:
    """The classes of a dataset: contiguous labels 0 ... C-1 inside, original ids in everything written."""

    ids: tuple[int, ...]
    names: tuple[str, ...]


@dataclass
class Annotations:
    """A COCO annotation file as arrays, which worker processes share instead of copying.

    image_ids (N,), file_names (N,)   in the order of the file
    offsets (N + 1,)                  the objects of image i are rows offsets[i] ... offsets[i + 1] - 1
    boxes (M, 4) float32              xyxy in pixels of the original image, as annotated
    labels (M,)                       contiguous
    crowd (M,) bool                   marked iscrowd
    trainable (M,) bool               neither crowd nor without area
    """

    split: Split
    categories: Categories
    image_ids: np.ndarray
    file_names: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    trainable: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        return self.split.images / str(self.file_names[index])

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) float64 xyxy pixels and labels (N,) of the objects an image is trained on."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        use = self.trainable[rows]
        return self.boxes[rows][use].astype(np.float64), self.labels[rows][use]

    def subset(self, indices: Sequence[int]) -> "Annotations":
        """The same annotations, of some of the images only."""
        indices = np.asarray(indices, dtype=np.int64)
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        rows = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)]).astype(
            np.int64
        )
        return replace(
            self,
            image_ids=self.image_ids[indices],
            file_names=self.file_names[indices],
            offsets=np.concatenate([[0], np.cumsum(ends - starts)]),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            trainable=self.trainable[rows],
            crowd=self.crowd[rows],
        )

    def summary(self, max_objects: int) -> str:
        """What is kept for training and what is not, as one line."""
        counts = np.diff(np.append(0, np.cumsum(self.trainable))[self.offsets])
        degenerate = ~self.trainable & ~self.crowd
        line = f"{len(self)} images ({(counts == 0).sum()} without objects), {counts.sum()} objects"
        line += f", {len(self.categories.ids)} classes; left out of training: {self.crowd.sum()} crowd boxes"
        line += f", {degenerate.sum()} boxes without area"
        if over := int((counts > max_objects).sum()):
            line += f"; {over} images have more than {max_objects} objects and give a part of them each time"
        return line


def load_annotations(split: Split, categories: Categories | None = None) -> Annotations:
    """Reads and checks an annotation file and that its images exist. Raises UserError.

    With `categories` (those of the training set or of a model) the file may use only these.
    """
    if not split.images.is_dir():
        raise UserError(f"{split.images}: no such folder of images")
    content = read_coco(split.json)
    found = _categories(content, split.json)
    if categories is not None:
        known = dict(zip(categories.ids, categories.names, strict=True))
        for category_id, name in zip(found.ids, found.names, strict=True):
            if known.get(category_id) != name:
                raise UserError(
                    f"{split.json}: category {category_id} ('{name}') is not a class of the training set or model"
                    f", which has {_listed(f'{i} ({n!r})' for i, n in known.items())}"
                )
    categories = categories or found
    images, entries = content["images"], content["annotations"]
    image_ids = np.array([image["id"] for image in images], dtype=np.int64)
    index_of_image = {image_id: index for index, image_id in enumerate(image_ids.tolist())}
    label_of_category = {category_id: label for label, category_id in enumerate(categories.ids)}
    owners = np.array([index_of_image[entry["image_id"]] for entry in entries], dtype=np.int64)
    labels = np.array([label_of_category[entry["category_id"]] for entry in entries], dtype=np.int64)
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries], dtype=bool)
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float32).reshape(-1, 4)

    rows = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=len(images))
    boxes, crowd = boxes[rows], crowd[rows]
    has_area = (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    boxes[:, 2:] += boxes[:, :2]
    annotations = Annotations(
        split=split,
        categories=categories,
        image_ids=image_ids,
        file_names=np.array([image["file_name"] for image in images], dtype=str),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes,
        labels=labels[rows],
        trainable=has_area & ~crowd,
        crowd=crowd,
    )
    _check_images_exist(annotations)
    return annotations


def read_json(path: Path, name: str | None = None):
    name = name or str(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{name}: is not JSON ({error})") from None


def read_coco(path: Path) -> dict:
    """The content of an annotation file in which every entry has what is needed, and names what exists."""
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            raise UserError(
                f"{path}: has no list '{key}'; a COCO annotation file holds images, annotations, categories"
            )
    for image in content["images"]:
        if not (is_id(image.get("id")) and isinstance(image.get("file_name"), str)):
            raise UserError(f"{path}: an image entry lacks a whole number 'id' or a 'file_name': {str(image)[:100]}")
    image_ids = [image["id"] for image in content["images"]]
    if not image_ids:
        raise UserError(f"{path}: holds no images")
    if len(set(image_ids)) != len(image_ids):
        raise UserError(f"{path}: an image id appears twice")
    known_images, known_categories = set(image_ids), _categories(content, path).ids
    for entry in content["annotations"]:
        name = f"{path}: annotation {entry.get('id')}"
        if not is_id(entry.get("category_id")) or entry["category_id"] not in known_categories:
            raise UserError(
                f"{name} names category {entry.get('category_id')}, which is not one of "
                f"{_listed(map(str, known_categories))}"
            )
        if not is_id(entry.get("image_id")) or entry["image_id"] not in known_images:
            raise UserError(f"{name} names image {entry.get('image_id')}, which is not in the file")
        box = entry.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(is_finite(v) for v in box)):
            raise UserError(f"{name} has bbox {box}: four finite numbers x, y, width, height are needed")
    return content


def _categories(content: dict, path: Path) -> Categories:
    entries = content["categories"]
    if not entries:
        raise UserError(f"{path}: holds no categories")
    for entry in entries:
        if not (is_id(entry.get("id")) and isinstance(entry.get("name"), str)):
            raise UserError(f"{path}: a category lacks a whole number 'id' or a 'name': {str(entry)[:100]}")
    entries = sorted(entries, key=lambda entry: entry["id"])
    ids = tuple(entry["id"] for entry in entries)
    if len(set(ids)) != len(ids):
        raise UserError(f"{path}: a category id appears twice in {_listed(map(str, ids))}")
    return Categories(ids, tuple(entry["name"] for entry in entries))


def _check_images_exist(annotations: Annotations) -> None:
    """One listing of the folder answers for most files; only names with a folder in them are looked up singly."""
    with os.scandir(annotations.split.images) as entries:
        present = {entry.name for entry in entries}
    missing = [
        name
        for name in annotations.file_names.tolist()
        if name not in present and not (annotations.split.images / name).is_file()
    ]
    if missing:
        raise UserError(
            f"{annotations.split.json}: {len(missing)} of {len(annotations)} images are missing from "
            f"{annotations.split.images}: {_listed(missing, most=3)}"
        )


def _listed(names, most: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_finite(value) -> bool:
    """A number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38
