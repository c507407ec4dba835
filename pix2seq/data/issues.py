"""Issues of a dataset: their kinds, and the checks of the entries of an annotation file.

Training leaves out entries that cannot be used and logs how many; `pix2seq check` lists every issue.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np

ERROR, WARNING = "error", "warning"

_IMAGE_REPLACED = "training uses another image instead; evaluation counts its objects as missed"
_ANNOTATION_IGNORED = "the annotation is ignored"
# Kind -> (severity, effect). An error loses data or teaches the model something wrong.
KINDS = {
    # annotation files
    "unusable": (ERROR, "training does not start"),
    "image-entry": (ERROR, "the image and its annotations are ignored"),
    "duplicate-image-id": (ERROR, "only the first image with this id is used; it gets the annotations of all of them"),
    "duplicate-file": (WARNING, "each entry is an image of its own"),
    "unknown-image": (ERROR, _ANNOTATION_IGNORED),
    "unknown-category": (ERROR, _ANNOTATION_IGNORED),
    "bbox-invalid": (ERROR, _ANNOTATION_IGNORED),
    "negative-size": (ERROR, "the annotation is not used for training"),
    "zero-size": (WARNING, "the annotation is not used for training"),
    "outside-image": (ERROR, "the box is empty after clipping to the image and is not used for training"),
    "beyond-edge": (WARNING, "the box is clipped to the image"),
    "size-unknown": (WARNING, "the boxes are not compared with the edges of the image"),
    "boxes-xyxy": (ERROR, "the boxes are still read as x, y, width, height; fix the file"),
    "boxes-fractions": (ERROR, "the boxes are still read as pixels; fix the file"),
    "iscrowd-invalid": (WARNING, "the annotation counts as iscrowd 0, an ordinary object"),
    "area-invalid": (WARNING, "evaluation uses the area of the box"),
    "duplicate-annotation-id": (WARNING, "evaluation numbers the annotations anew"),
    "no-objects": (ERROR, "there is nothing to train on or to evaluate; AP is -1"),
    "class-name-twice": (WARNING, "they are different classes, distinguished only by their ids"),
    "class-unused": (WARNING, "the model has the class and learns not to predict it"),
    # image files
    "path-outside": (ERROR, f"the file is not opened; {_IMAGE_REPLACED}"),
    "missing-file": (ERROR, _IMAGE_REPLACED),
    "other-unicode-form": (WARNING, "the file is used"),
    "unreadable-file": (ERROR, _IMAGE_REPLACED),
    "too-many-pixels": (ERROR, f"the file is not decoded; {_IMAGE_REPLACED}"),
    "size-differs": (ERROR, "the boxes are read as pixels of the image file"),
    "suffix-differs": (WARNING, "the format is detected from the content"),
    "exif-applied": (WARNING, "the EXIF orientation is applied, because the annotated size matches the rotated image"),
    "exif-ignored": (WARNING, "the image is used as stored; verify that its boxes fit"),
    "cmyk": (WARNING, "the image is converted to RGB"),
    "other-colors": (WARNING, "the image is converted to RGB"),
    "16-bit": (WARNING, "only the upper 8 bits are used"),
    "grayscale": (WARNING, "the image is converted to RGB with three equal channels"),
    "palette": (WARNING, "the image is converted to RGB"),
    "animated": (WARNING, "only the first frame is used"),
    "transparent": (WARNING, "the alpha channel is ignored"),
    "duplicate-image": (WARNING, "both images are used"),
    # both splits
    "leak": (WARNING, "the image is in both splits; its AP does not measure generalization"),
}


@dataclass(frozen=True)
class DatasetIssue:
    """An issue of a dataset.

    Args:
        kind: A key of `KINDS`.
        file: The annotation file, or the folder of the images.
        entry: The affected entry: "annotation 7", "image 3", "category 2", a file name, or "" for the whole file.
        value: Description of the invalid value.
    """

    kind: str
    file: str
    entry: str
    value: str

    @property
    def severity(self) -> str:
        """`ERROR` or `WARNING`."""
        return KINDS[self.kind][0]

    @property
    def effect(self) -> str:
        """How training and evaluation treat the entry."""
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.entry}: ' if self.entry else ''}{self.value}"


def count_by_kind(issues: Iterable[DatasetIssue]) -> str:
    """Formats the number of issues of each kind, such as "3 unknown-category, 1 bbox-invalid"."""
    counts = Counter(issue.kind for issue in issues)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def usable_images(entries: list[dict], path: Path) -> tuple[list[dict], list[DatasetIssue]]:
    """Selects the image entries with a valid and unique id and a file name.

    Args:
        entries: The list "images" of an annotation file.
        path: The annotation file, for the issues.

    Returns:
        The usable entries, and the issues of all entries.
    """
    issues: list[DatasetIssue] = []
    name_by_id: dict[int, str] = {}
    names: set[str] = set()
    usable = []
    for entry in entries:
        image_id, name = entry.get("id"), entry.get("file_name")
        if not (is_id(image_id) and is_text(name) and name):
            value = f"'id' must be an integer and 'file_name' Unicode text: {entry}"[:200]
            issues.append(DatasetIssue("image-entry", str(path), "", value))
            continue
        entry_name = f"image {image_id}"
        if image_id in name_by_id:
            value = f"{name!r} has the id of {name_by_id[image_id]!r}"
            issues.append(DatasetIssue("duplicate-image-id", str(path), entry_name, value))
            continue
        if name in names:
            issues.append(DatasetIssue("duplicate-file", str(path), entry_name, f"{name!r} is used by another entry"))
        name_by_id[image_id] = name
        names.add(name)
        usable.append(entry)
    return usable, issues


def usable_objects(
    entries: list[dict], image_ids: Iterable[int], category_ids: Iterable[int], path: Path
) -> tuple[list[dict], list[DatasetIssue]]:
    """Selects the annotations with a valid box, a known image and a known category.

    An invalid "iscrowd" becomes 0 and an invalid "area" is removed, in place.

    Args:
        entries: The list "annotations" of an annotation file.
        image_ids: Ids of the images.
        category_ids: Ids of the categories.
        path: The annotation file, for the issues.

    Returns:
        The usable entries, and the issues of all entries.
    """
    image_ids, category_ids = set(image_ids), set(category_ids)
    known_categories = join_names(map(str, sorted(category_ids)))
    usable: list[dict] = []
    issues: list[DatasetIssue] = []
    seen: set[int] = set()

    def add_issue(kind: str, entry: dict, value: str) -> None:
        issues.append(DatasetIssue(kind, str(path), _entry_name(entry), value))

    for entry in entries:
        annotation_id, image_id, category_id = entry.get("id"), entry.get("image_id"), entry.get("category_id")
        if is_id(annotation_id):
            if annotation_id in seen:
                add_issue("duplicate-annotation-id", entry, "another annotation has the same id")
            seen.add(annotation_id)
        bbox = entry.get("bbox")
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(is_finite(number) for number in bbox)):
            add_issue("bbox-invalid", entry, f"bbox {bbox}: must be four finite numbers x, y, width, height")
            continue
        if not (is_id(image_id) and image_id in image_ids):
            add_issue("unknown-image", entry, f"image {image_id} is not in the file")
            continue
        if not (is_id(category_id) and category_id in category_ids):
            add_issue("unknown-category", entry, f"category {category_id} is not one of {known_categories}")
            continue
        usable.append(entry)
        if entry.get("iscrowd", 0) not in (0, 1):
            add_issue("iscrowd-invalid", entry, f"iscrowd {entry['iscrowd']!r}: must be 0 or 1")
            entry["iscrowd"] = 0
        area = entry.get("area")
        if area is not None and not (is_finite(area) and area >= 0):
            add_issue("area-invalid", entry, f"area {area!r}: must be a number of at least 0")
            del entry["area"]
    return usable, issues


def find_box_issues(
    boxes: np.ndarray, sizes: np.ndarray, crowd: np.ndarray, entries: list[dict], path: Path
) -> list[DatasetIssue]:
    """Finds boxes without area, boxes that leave their image, and files whose boxes probably have another format.

    A tolerance of one pixel at the edges allows for rounding.

    Args:
        boxes: float32 (M, 4), x, y, width, height in pixels.
        sizes: int (M, 2), the (height, width) of the image of each box, 0 if unknown.
        crowd: bool (M,), whether the box is a crowd.
        entries: The M annotations, for the issues.
        path: The annotation file, for the issues.
    """
    x, y, width, height = boxes.T
    image_height, image_width = sizes.T
    known = sizes.min(axis=1) > 0
    negative = (boxes[:, 2:] < 0).any(axis=1)
    # Includes boxes that are thinner than the resolution of float32.
    empty = (boxes[:, :2] + boxes[:, 2:] <= boxes[:, :2]).any(axis=1) & ~negative
    checked = known & ~negative & ~empty
    outside = checked & ((x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0))
    leaves = (x < -1) | (y < -1) | (x + width > image_width + 1) | (y + height > image_height + 1)
    beyond = checked & leaves & ~outside
    fits_as_xyxy = known & (width > x) & (height > y) & (width <= image_width + 1) & (height <= image_height + 1)

    issues = []
    masks = {"negative-size": negative, "zero-size": empty, "outside-image": outside, "beyond-edge": beyond}
    for kind, mask in masks.items():
        for index in np.flatnonzero(mask).tolist():
            value = f"bbox {entries[index]['bbox']}"
            if kind in ("outside-image", "beyond-edge"):
                value += f", image {image_width[index]} x {image_height[index]}"
                value += " (as x1, y1, x2, y2 it would fit)" if fits_as_xyxy[index] else ""
            issues.append(DatasetIssue(kind, str(path), _entry_name(entries[index]), value))
    count = len(boxes)
    if count < 10:
        return issues
    # A share of 0.99, because many boxes in xywh format near the origin would fit as xyxy, too.
    compared = known & ~crowd
    if (beyond | outside).mean() > 0.1 and compared.any() and fits_as_xyxy[compared].mean() > 0.99:
        num_leaving = (beyond | outside).sum()
        value = f"{num_leaving} of {count} boxes leave their images; nearly all would fit as x1, y1, x2, y2"
        issues.append(DatasetIssue("boxes-xyxy", str(path), "", value))
    if (boxes <= 1).all():
        value = f"all {count} boxes lie within one pixel; they may be fractions of the image size"
        issues.append(DatasetIssue("boxes-fractions", str(path), "", value))
    return issues


def join_names(names: Iterable[str], max_names: int = 10) -> str:
    """Joins names by commas; further names are counted."""
    names = list(names)
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


def sanitize(name: str) -> str:
    """Escapes the characters of a name that cannot be printed, such as line breaks."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def is_text(value) -> TypeGuard[str]:
    """Returns True for a string that can be encoded as UTF-8; JSON may contain lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_id(value) -> TypeGuard[int]:
    """Returns True for an integer that int64 can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_finite(value) -> TypeGuard[int | float]:
    """Returns True for a number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _entry_name(entry: dict) -> str:
    return f"annotation {entry.get('id')}"
