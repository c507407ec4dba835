"""COCO annotation files as arrays, for training and evaluation.

A file that cannot be used raises a UserError. Single entries that cannot be used are ignored and listed as issues.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pix2seq.data.image_files import BadImageError, ImageFile
from pix2seq.data.image_stores import ImageStore, open_store
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
    """The classes of a dataset. A label is an index into both tuples.

    Args:
        ids: Category ids of the annotation file, ascending.
        names: Class names.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]


@dataclass
class Annotations:
    """N images and M objects of a COCO annotation file, as arrays, which worker processes share without copies.

    Args:
        split: Where the files are.
        categories: The classes.
        store: Reads the image files.
        image_ids: int64 (N,), in the order of the file.
        file_names: Strings (N,).
        locations: (N, ...), the location of each image in the store.
        sizes: int32 (N, 2), the annotated (height, width) of each image in pixels, 0 if unknown.
        offsets: int64 (N + 1,). The objects of image i are those from offsets[i] to offsets[i + 1] - 1.
        boxes: float32 (M, 4), xyxy in pixels of the original image, not clipped.
        labels: int64 (M,), from 0 to the number of classes - 1.
        trainable: bool (M,), False for crowds and boxes without area.
        crowd: bool (M,), marked as iscrowd.
        issues: Issues of the annotation file and of the locations of its images.
        bad_images: Images that are known to be unusable, by index.
    """

    split: Split
    categories: Categories
    store: ImageStore
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
        """Reads an image file and decodes its header. Raises BadImageError."""
        if index in self.bad_images:
            raise self.bad_images[index]
        size = tuple(self.sizes[index].tolist())
        return ImageFile(self.store.read(self.locations[index]), annotated_size=size if min(size) > 0 else None)

    def name(self, index: int) -> str:
        """Returns the path of an image for messages."""
        return f"{self.split.images}/{sanitize(str(self.file_names[index]))}"

    def input_files(self) -> Iterator[Path]:
        """Yields the annotation file and the image files, which need not exist."""
        yield self.split.json
        yield from (self.split.images / name for name in self.file_names.tolist())

    def objects(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the trainable boxes of an image, float64 (K, 4), xyxy in pixels, and their labels (K,)."""
        objects = slice(self.offsets[index], self.offsets[index + 1])
        trainable = self.trainable[objects]
        return self.boxes[objects][trainable].astype(np.float64), self.labels[objects][trainable]

    @property
    def digest(self) -> str:
        """A hash of the ids and names of the images."""
        images = [self.image_ids.tolist(), self.file_names.tolist()]
        return hashlib.blake2b(json.dumps(images).encode(), digest_size=16).hexdigest()

    def subset(self, indices: Sequence[int]) -> "Annotations":
        """Returns the annotations of some images, in the given order."""
        images = np.asarray(indices, dtype=np.int64)
        starts, ends = self.offsets[images], self.offsets[images + 1]
        ranges = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
        objects = np.concatenate(ranges).astype(np.int64)
        bad_images = {new: self.bad_images[old] for new, old in enumerate(images.tolist()) if old in self.bad_images}
        return replace(
            self,
            image_ids=self.image_ids[images],
            file_names=self.file_names[images],
            locations=self.locations[images],
            sizes=self.sizes[images],
            offsets=np.concatenate([[0], np.cumsum(ends - starts)]),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            trainable=self.trainable[objects],
            crowd=self.crowd[objects],
            bad_images=bad_images,
        )

    def summary(self, max_objects: int) -> list[str]:
        """Returns lines about the objects that training uses and ignores, and about the issues if there are any.

        Args:
            max_objects: Largest number of objects in a token sequence.
        """
        counts = np.diff(np.append(0, np.cumsum(self.trainable))[self.offsets])
        num_empty = (~self.trainable & ~self.crowd).sum()
        line = (
            f"{len(self)} images ({(counts == 0).sum()} without objects), {counts.sum()} objects, "
            f"{len(self.categories.ids)} classes; not used for training: {self.crowd.sum()} crowd boxes, "
            f"{num_empty} boxes without area"
        )
        if num_larger := int((counts > max_objects).sum()):
            line += f"; {num_larger} images have more than {max_objects} objects, of which each sequence has a part"
        lines = [line]
        if self.issues:
            lines.append(f"issues in {self.split.json}: {count_by_kind(self.issues)} (--check_data lists them)")
        return lines


def load_annotations(split: Split, categories: Categories | None = None, follow_links: bool = False) -> Annotations:
    """Reads an annotation file and locates its images.

    Args:
        split: Where the files are.
        categories: Classes of the training set or model. The file may only contain these.
        follow_links: Also open images behind symbolic links that leave the folder of images.

    Raises:
        UserError: The file cannot be used, or it has other classes.
    """
    store = open_store(split.images, follow_links)
    content = read_coco(split.json)
    file_categories = parse_categories(content, split.json)
    if categories is None:
        categories = file_categories
    else:
        _check_known(file_categories, categories, split.json)
    images, image_issues = usable_images(content["images"], split.json)
    if not images:
        raise UserError(f"{split.json}: contains no usable images ({count_by_kind(image_issues)})")
    image_ids = [image["id"] for image in images]
    entries, object_issues = usable_objects(content["annotations"], image_ids, categories.ids, split.json)

    sizes = np.array([_annotated_size(image) for image in images], dtype=np.int32)
    index_of_image = {image_id: index for index, image_id in enumerate(image_ids)}
    label_of_category = {category_id: label for label, category_id in enumerate(categories.ids)}
    image_index = np.array([index_of_image[entry["image_id"]] for entry in entries], dtype=np.int64)
    labels = np.array([label_of_category[entry["category_id"]] for entry in entries], dtype=np.int64)
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries], dtype=bool)
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float32).reshape(-1, 4)
    box_issues = find_box_issues(boxes, sizes[image_index], crowd, entries, split.json)

    names = [image["file_name"] for image in images]
    locations, errors = store.locate(names)
    file_issues = [
        DatasetIssue(error.kind, str(split.images), sanitize(names[index]), error.reason)
        for index, error in errors.items()
    ]

    order = np.argsort(image_index, kind="stable")
    boxes, crowd = boxes[order], crowd[order]
    boxes[:, 2:] += boxes[:, :2]
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # in float32
    return Annotations(
        split=split,
        categories=categories,
        store=store,
        image_ids=np.array(image_ids, dtype=np.int64),
        file_names=np.array(names, dtype=np.dtypes.StringDType()),
        locations=locations,
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image_index, minlength=len(images)))]),
        boxes=boxes,
        labels=labels[order],
        trainable=has_area & ~crowd,
        crowd=crowd,
        issues=image_issues + object_issues + box_issues + file_issues,
        bad_images={index: error for index, error in errors.items() if error.kind != "other-unicode-form"},
    )


def read_json(path: Path, name: str | None = None, object_pairs_hook: Callable | None = None):
    """Reads a JSON file.

    Args:
        path: The file.
        name: Its name in error messages, such as a flag and the path. Defaults to the path.
        object_pairs_hook: See `json.loads`.

    Raises:
        UserError: The file cannot be read or is not JSON.
    """
    name = name or str(path)
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=object_pairs_hook)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: is not JSON ({error})") from None


def read_coco(path: Path) -> dict:
    """Reads a COCO annotation file without its segmentations, which are most of COCO's 450 MB and are not used.

    Returns:
        The content, with valid "categories" and the lists "images" (not empty) and "annotations". The entries of these
        lists are dictionaries with unverified content.

    Raises:
        UserError: The file is not a COCO annotation file, or it has no images or categories.
    """
    content = read_json(path, object_pairs_hook=_parse_object)
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            raise UserError(
                f"{path}: has no list '{key}' of objects; COCO files have images, annotations and categories"
            )
    if not content["images"]:
        raise UserError(f"{path}: contains no images")
    parse_categories(content, path)
    return content


def _parse_object(pairs: list[tuple]) -> dict:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        raise ValueError(f"a key appears twice in {ascii(list(entry))[:100]}")
    entry.pop("segmentation", None)
    return entry


def parse_categories(content: dict, path: Path) -> Categories:
    """Returns the classes of an annotation file, in ascending order of their ids. Raises UserError."""
    entries = content["categories"]
    if not entries:
        raise UserError(f"{path}: contains no categories")
    for entry in entries:
        if not (is_id(entry.get("id")) and is_text(entry.get("name"))):
            raise UserError(f"{path}: a category has no integer 'id' or no 'name': {ascii(entry)[:100]}")
    entries = sorted(entries, key=lambda entry: entry["id"])
    ids = tuple(entry["id"] for entry in entries)
    if len(set(ids)) != len(ids):
        raise UserError(f"{path}: a category id appears twice in {join_names(map(str, ids))}")
    return Categories(ids, tuple(entry["name"] for entry in entries))


def _check_known(categories: Categories, known: Categories, path: Path) -> None:
    """Raises UserError for a class that is not one of the known classes."""
    known_names = dict(zip(known.ids, known.names, strict=True))
    for category_id, name in zip(categories.ids, categories.names, strict=True):
        if known_names.get(category_id) != name:
            raise UserError(
                f"{path}: category {category_id} ('{name}') is not a class of the training set or model, which has "
                f"{join_names(f'{known_id} ({known_name!r})' for known_id, known_name in known_names.items())}"
            )


def _annotated_size(image: dict) -> tuple[int, int]:
    """The (height, width) of an image entry, (0, 0) unless both are positive whole numbers."""
    height, width = image.get("height"), image.get("width")
    if not (is_finite(height) and is_finite(width)):
        return 0, 0
    is_valid = all(0 < length < 2**31 and length == int(length) for length in (height, width))
    return (int(height), int(width)) if is_valid else (0, 0)
