"""What can be wrong with a dataset: the kinds of issues, and those of an annotation file's entries.

Training leaves out what is unusable and says so; `python -m pix2seq check` lists all of it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ERROR, WARNING = "error", "warning"

# Kind -> how bad it is, and what becomes of it. Errors lose data or teach something wrong.
_IMAGE_REPLACED = "training takes another image in its place; evaluation counts its objects as not found"
_OBJECT_LEFT_OUT = "the annotation is left out"
KINDS = {
    # the annotation file
    "unusable": (ERROR, "training does not start"),
    "image-entry": (ERROR, "the image entry is left out, and its annotations"),
    "duplicate-image-id": (ERROR, "the first image of this id is used, and gets the annotations of all"),
    "duplicate-file": (WARNING, "each entry is a sample of its own"),
    "unknown-image": (ERROR, _OBJECT_LEFT_OUT),
    "unknown-category": (ERROR, _OBJECT_LEFT_OUT),
    "bbox-invalid": (ERROR, _OBJECT_LEFT_OUT),
    "negative-size": (ERROR, "the annotation is left out of training"),
    "zero-size": (WARNING, "the annotation is left out of training"),
    "outside-image": (ERROR, "nothing of the box is left when it is clipped to the image: it is not trained on"),
    "beyond-edge": (WARNING, "the box is clipped to the image"),
    "size-unknown": (WARNING, "its boxes are not compared to its edges"),
    "boxes-xyxy": (ERROR, "the boxes are read as x, y, width, height all the same: mend the file"),
    "boxes-fractions": (ERROR, "the boxes are read as pixels all the same: mend the file"),
    "iscrowd-invalid": (WARNING, "taken as 0, an ordinary object"),
    "area-invalid": (WARNING, "the area of the box is used in scoring"),
    "duplicate-annotation-id": (WARNING, "annotations are numbered anew for scoring"),
    "no-objects": (ERROR, "there is nothing to train on, or to measure: an AP of -1"),
    "class-name-twice": (WARNING, "both are classes; only their ids tell them apart"),
    "class-unused": (WARNING, "the model has the class, and learns that it is never there"),
    # files
    "path-outside": (ERROR, f"it is never opened; {_IMAGE_REPLACED}"),
    "missing-file": (ERROR, _IMAGE_REPLACED),
    "other-unicode-form": (WARNING, "the file is used"),
    "unreadable-file": (ERROR, _IMAGE_REPLACED),
    "too-many-pixels": (ERROR, f"it is not decoded; {_IMAGE_REPLACED}"),
    "size-differs": (ERROR, "the boxes are taken as pixels of the file as it is"),
    "suffix-differs": (WARNING, "the content decides how it is read"),
    "exif-turned": (WARNING, "the image is turned, as its annotated size asks for"),
    "exif-ignored": (WARNING, "the image is used as it is stored; see that its boxes fit"),
    "cmyk": (WARNING, "converted to RGB"),
    "other-colours": (WARNING, "converted to RGB"),
    "16-bit": (WARNING, "the upper 8 bits are used"),
    "grey": (WARNING, "read as RGB with three equal channels"),
    "palette": (WARNING, "converted to RGB"),
    "animated": (WARNING, "its first frame is used"),
    "transparent": (WARNING, "what lies under the transparency is used as it is"),
    "duplicate-image": (WARNING, "both are used"),
    # both splits together
    "leak": (WARNING, "used in both splits: what is measured on it is not what the model can do"),
}


@dataclass(frozen=True)
class DatasetIssue:
    """One issue: its kind, the file, the entry in it ("annotation 7", a file name, or "") and what was found."""

    kind: str
    file: str
    entry: str
    value: str

    @property
    def severity(self) -> str:
        return KINDS[self.kind][0]

    @property
    def effect(self) -> str:
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        return f"{self.file}: {f'{self.entry}: ' if self.entry else ''}{self.value}"


def count_by_kind(issues: Iterable[DatasetIssue]) -> str:
    """How many there are of each kind, as one line: "3 unknown-category, 1 bbox-invalid"."""
    counts = Counter(issue.kind for issue in issues)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def usable_images(entries: list[dict], path: Path) -> tuple[list[dict], list[DatasetIssue]]:
    """The image entries that have what is needed, each id once, and what is wrong with the others."""
    issues, by_id, files = [], {}, set()
    for entry in entries:
        image_id, name = entry.get("id"), entry.get("file_name")
        if not (is_id(image_id) and is_text(name) and name):
            value = f"no whole number 'id' or no 'file_name' of Unicode text: {entry}"[:200]
            issues.append(DatasetIssue("image-entry", str(path), "", value))
        elif image_id in by_id:
            value = f"{name!r} has the id of {by_id[image_id]['file_name']!r}"
            issues.append(DatasetIssue("duplicate-image-id", str(path), f"image {image_id}", value))
        else:
            if name in files:
                issues.append(
                    DatasetIssue("duplicate-file", str(path), f"image {image_id}", f"{name!r} is listed again")
                )
            by_id[image_id] = entry
            files.add(name)
    return list(by_id.values()), issues


def usable_objects(
    entries: list[dict], image_ids: Iterable[int], category_ids: Iterable[int], path: Path
) -> tuple[list[dict], list[DatasetIssue]]:
    """The annotations with four finite numbers, of an image and a class that exist, and what is wrong with them and
    with the others. What is wrong with iscrowd and area is taken out of the entries."""
    image_ids, category_ids = set(image_ids), set(category_ids)
    known = join_names(map(str, sorted(category_ids)))
    usable, issues, seen = [], [], set()
    for entry in entries:
        kind, value, box = None, "", entry.get("bbox")
        if is_id(annotation_id := entry.get("id")):
            if annotation_id in seen:
                issues.append(
                    DatasetIssue("duplicate-annotation-id", str(path), _name(entry), "the id was used before")
                )
            seen.add(annotation_id)
        if not (isinstance(box, list) and len(box) == 4 and all(is_finite(number) for number in box)):
            kind, value = "bbox-invalid", f"bbox {box}: four finite numbers x, y, width, height are needed"
        elif not is_id(entry.get("image_id")) or entry["image_id"] not in image_ids:
            kind, value = "unknown-image", f"image {entry.get('image_id')} is not in the file"
        elif not is_id(entry.get("category_id")) or entry["category_id"] not in category_ids:
            kind, value = "unknown-category", f"category {entry.get('category_id')} is not one of {known}"
        if kind is not None:
            issues.append(DatasetIssue(kind, str(path), _name(entry), value))
            continue
        usable.append(entry)
        if entry.get("iscrowd", 0) not in (0, 1):
            issues.append(
                DatasetIssue("iscrowd-invalid", str(path), _name(entry), f"iscrowd {entry['iscrowd']!r}: 0 or 1")
            )
            entry["iscrowd"] = 0
        if (area := entry.get("area")) is not None and not (is_finite(area) and area >= 0):
            issues.append(DatasetIssue("area-invalid", str(path), _name(entry), f"area {area!r}"))
            del entry["area"]
    return usable, issues


def find_box_issues(
    boxes: np.ndarray, sizes: np.ndarray, crowd: np.ndarray, entries: list[dict], path: Path
) -> list[DatasetIssue]:
    """What is wrong with boxes (M, 4) xywh that are numbers, given the (height, width) (M, 2) of their images, 0 where
    unknown. A pixel over the edge is rounding."""
    issues = []
    x, y, width, height = boxes.T
    known = sizes.min(axis=1) > 0
    limit_y, limit_x = sizes.T
    negative = (boxes[:, 2:] < 0).any(axis=1)
    empty = (boxes[:, :2] + boxes[:, 2:] <= boxes[:, :2]).any(axis=1)  # also one that is thinner than float32 can tell
    solid = ~negative & ~empty
    outside = solid & known & ((x >= limit_x) | (y >= limit_y) | (x + width <= 0) | (y + height <= 0))
    beyond = solid & known & ~outside & ((x < -1) | (y < -1) | (x + width > limit_x + 1) | (y + height > limit_y + 1))
    as_corners = known & (width > x) & (height > y) & (width <= limit_x + 1) & (height <= limit_y + 1)
    for kind, rows in (
        ("negative-size", negative),
        ("zero-size", empty & ~negative),
        ("outside-image", outside),
        ("beyond-edge", beyond),
    ):
        for row in np.flatnonzero(rows).tolist():
            value = f"bbox {entries[row]['bbox']}"
            if kind in ("outside-image", "beyond-edge"):
                value += f", image {limit_x[row]} x {limit_y[row]}"
                value += " (as x1, y1, x2, y2 it would fit)" if as_corners[row] else ""
            issues.append(DatasetIssue(kind, str(path), _name(entries[row]), value))
    count = len(boxes)
    # Of boxes that really are xywh, some lie far from the origin and are smaller than their distance from it.
    compared = known & ~crowd
    if count >= 10 and (beyond | outside).mean() > 0.1 and compared.any() and as_corners[compared].mean() > 0.99:
        value = (
            f"{(beyond | outside).sum()} of {count} boxes leave their images; as x1, y1, x2, y2 nearly all would fit"
        )
        issues.append(DatasetIssue("boxes-xyxy", str(path), "", value))
    if count >= 10 and (boxes <= 1).all():
        issues.append(
            DatasetIssue("boxes-fractions", str(path), "", f"all {count} boxes lie within one pixel: fractions?")
        )
    return issues


def _name(entry: dict) -> str:
    return f"annotation {entry.get('id')}"


def join_names(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_text(value) -> bool:
    """A string that can be written: JSON may hold halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def sanitize(name: str) -> str:
    """A file's name in one line."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_finite(value) -> bool:
    """A number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38
