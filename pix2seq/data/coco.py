"""COCO annotation files as arrays, for training and evaluation.

What makes a file useless is said in one line that names it, before any work is done with it; what is wrong with single
entries is left out and told: see issues.py.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pix2seq.data.image_files import BadImageError, ImageFile, Store, open_store
from pix2seq.data.issues import (
    DatasetIssue,
    count_by_kind,
    find_box_issues,
    is_finite,
    is_id,
    is_text,
    join_names,
    sanitize,
    usable_images,
    usable_objects,
)
from pix2seq.data.layouts import Split
from pix2seq.errors import UserError


@dataclass(frozen=True)
class Categories:
    """The classes of a dataset: contiguous labels 0 ... C-1 inside, original ids in everything written."""

    ids: tuple[int, ...]
    names: tuple[str, ...]


@dataclass
class Annotations:
    """A COCO annotation file as arrays, which worker processes share instead of copying.

    image_ids (N,), file_names (N,)   in the order of the file
    locations (N, ...)                   where the store finds each image
    sizes (N, 2)                      (height, width) of each image as annotated, 0 if it is not
    offsets (N + 1,)                  the objects of image i are rows offsets[i] ... offsets[i + 1] - 1
    boxes (M, 4) float32              xyxy in pixels of the original image, as annotated
    labels (M,)                       contiguous
    crowd (M,) bool                   marked iscrowd
    trainable (M,) bool               neither crowd nor without area
    issues                            what is wrong with the file, and with the places of its images
    bad_images                        of images that are known to be unusable, by index, why
    """

    split: Split
    categories: Categories
    store: Store
    image_ids: np.ndarray
    file_names: np.ndarray
    locations: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    trainable: np.ndarray
    crowd: np.ndarray
    issues: list[DatasetIssue] = field(default_factory=list)
    bad_images: dict[int, BadImageError] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_ids)

    def image_file(self, index: int) -> ImageFile:
        """The image's file, of which the header is read. Raises BadImageError."""
        if index in self.bad_images:
            raise self.bad_images[index]
        annotated = tuple(self.sizes[index].tolist())
        return ImageFile(self.store.read(self.locations[index]), annotated if min(annotated) > 0 else None)

    def name(self, index: int) -> str:
        """The image's file, to be shown."""
        return f"{self.split.images}/{sanitize(str(self.file_names[index]))}"

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, 4) float64 xyxy pixels and labels (N,) of the objects an image is trained on."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        use = self.trainable[rows]
        return self.boxes[rows][use].astype(np.float64), self.labels[rows][use]

    @property
    def digest(self) -> str:
        """Tells one list of images from another, by their ids and names."""
        listed = [self.image_ids.tolist(), self.file_names.tolist()]
        return hashlib.blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest()

    def subset(self, indices: Sequence[int]) -> "Annotations":
        """The same annotations, of some of the images only."""
        indices = np.asarray(indices, dtype=np.int64)
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        rows = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)]).astype(
            np.int64
        )
        bad = {new: self.bad_images[old] for new, old in enumerate(indices.tolist()) if old in self.bad_images}
        return replace(
            self,
            image_ids=self.image_ids[indices],
            file_names=self.file_names[indices],
            locations=self.locations[indices],
            sizes=self.sizes[indices],
            offsets=np.concatenate([[0], np.cumsum(ends - starts)]),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            trainable=self.trainable[rows],
            crowd=self.crowd[rows],
            bad_images=bad,
        )

    def summary(self, max_objects: int) -> list[str]:
        """What is kept for training and what is not: a line, and one more if there are issues."""
        counts = np.diff(np.append(0, np.cumsum(self.trainable))[self.offsets])
        degenerate = ~self.trainable & ~self.crowd
        line = f"{len(self)} images ({(counts == 0).sum()} without objects), {counts.sum()} objects"
        line += f", {len(self.categories.ids)} classes; left out of training: {self.crowd.sum()} crowd boxes"
        line += f", {degenerate.sum()} boxes without area"
        if over := int((counts > max_objects).sum()):
            line += f"; {over} images have more than {max_objects} objects and give a part of them each time"
        if not self.issues:
            return [line]
        return [
            line,
            f"issues in {self.split.json}: {count_by_kind(self.issues)} (--check_data says where, and what becomes of it)",
        ]


def load_annotations(split: Split, categories: Categories | None = None, follow_links: bool = False) -> Annotations:
    """Reads an annotation file and finds its images; what cannot be used of either is in `issues`. Raises UserError.

    With `categories` (those of the training set or of a model) the file may use only these.
    """
    store = open_store(split.images, follow_links)
    content = read_coco(split.json)
    found = categories_of(content, split.json)
    if categories is not None:
        known = dict(zip(categories.ids, categories.names, strict=True))
        for category_id, name in zip(found.ids, found.names, strict=True):
            if known.get(category_id) != name:
                raise UserError(
                    f"{split.json}: category {category_id} ('{name}') is not a class of the training set or model"
                    f", which has {join_names(f'{i} ({n!r})' for i, n in known.items())}"
                )
    categories = categories or found
    images, issues = usable_images(content["images"], split.json)
    if not images:
        raise UserError(f"{split.json}: holds no images that can be used ({count_by_kind(issues)})")
    entries, wrong = usable_objects(
        content["annotations"], (image["id"] for image in images), categories.ids, split.json
    )
    issues += wrong

    image_ids = np.array([image["id"] for image in images], dtype=np.int64)
    sizes = np.array([_annotated_size(image) for image in images], dtype=np.int32)
    index_of_image = {image_id: index for index, image_id in enumerate(image_ids.tolist())}
    label_of_category = {category_id: label for label, category_id in enumerate(categories.ids)}
    owners = np.array([index_of_image[entry["image_id"]] for entry in entries], dtype=np.int64)
    labels = np.array([label_of_category[entry["category_id"]] for entry in entries], dtype=np.int64)
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries], dtype=bool)
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float32).reshape(-1, 4)
    issues += find_box_issues(boxes, sizes[owners], crowd, entries, split.json)

    names = [image["file_name"] for image in images]
    locations, misplaced = store.locate(names)
    issues += [
        DatasetIssue(bad.kind, str(split.images), sanitize(names[index]), bad.reason) for index, bad in misplaced.items()
    ]
    rows = np.argsort(owners, kind="stable")
    boxes, crowd = boxes[rows], crowd[rows]
    boxes[:, 2:] += boxes[:, :2]
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # by what is left of it in float32
    return Annotations(
        split=split,
        categories=categories,
        store=store,
        image_ids=image_ids,
        # Not a list: workers that look at Python objects copy them, and their memory grows.
        file_names=np.array(names, dtype=np.dtypes.StringDType()),
        locations=locations,
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(images)))]),
        boxes=boxes,
        labels=labels[rows],
        trainable=has_area & ~crowd,
        crowd=crowd,
        issues=issues,
        bad_images={index: bad for index, bad in misplaced.items() if bad.kind != "other-unicode-form"},
    )


def read_json(path: Path, name: str | None = None, object_pairs_hook=None):
    name = name or str(path)
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=object_pairs_hook)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not JSON ({error})") from None


def read_coco(path: Path) -> dict:
    """The content of an annotation file that holds images and classes, without its segmentations: these are most of
    COCO's 450 MB, and nothing here uses them. Its entries are objects; what is in them is not checked. Raises
    UserError."""
    content = read_json(path, object_pairs_hook=_entry)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            raise UserError(
                f"{path}: has no list '{key}'; a COCO annotation file holds images, annotations, categories"
            )
    if not content["images"]:
        raise UserError(f"{path}: holds no images")
    categories_of(content, path)
    return content


def _entry(pairs: list[tuple]) -> dict:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        raise ValueError(f"a key stands twice in {ascii(list(entry))[:100]}")
    entry.pop("segmentation", None)
    return entry


def categories_of(content: dict, path: Path) -> Categories:
    """The classes of an annotation file, by id. Raises UserError."""
    entries = content["categories"]
    if not entries:
        raise UserError(f"{path}: holds no categories")
    for entry in entries:
        if not (is_id(entry.get("id")) and is_text(entry.get("name"))):
            raise UserError(f"{path}: a category lacks a whole number 'id' or a 'name': {ascii(entry)[:100]}")
    entries = sorted(entries, key=lambda entry: entry["id"])
    ids = tuple(entry["id"] for entry in entries)
    if len(set(ids)) != len(ids):
        raise UserError(f"{path}: a category id appears twice in {join_names(map(str, ids))}")
    return Categories(ids, tuple(entry["name"] for entry in entries))


def _annotated_size(image: dict) -> tuple[int, int]:
    size = image.get("height"), image.get("width")
    whole = [is_finite(length) and 0 < length < 2**31 and length == int(length) for length in size]
    return (int(size[0]), int(size[1])) if all(whole) else (0, 0)
