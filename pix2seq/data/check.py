"""Dataset report: the contents of a dataset and all of its issues, found before training and without a model."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data.coco import Annotations, load_annotations
from pix2seq.data.image_files import FORMATS_OF_SUFFIX, BadImageError, ImageFile
from pix2seq.data.issues import ERROR, WARNING, DatasetIssue, sanitize
from pix2seq.data.layouts import Split
from pix2seq.data.overview_figure import SplitSummary, dataset_overview
from pix2seq.data.recommended_sizes import recommended_sizes
from pix2seq.errors import UserError
from pix2seq.progress import progress
from pix2seq.visualization import CELL, color_of, draw_boxes, enlarge

REPORT_FILES = ("check.json", "check.png")
NUM_EXAMPLES = 8  # images in the figure
MAX_PRINTED = 20  # issues of a kind that are printed; check.json has all of them


@dataclass
class DatasetReport:
    """The result of `check_dataset`.

    Args:
        issues: All issues, by kind and file.
        statistics: Counts and sizes, by name of the split.
        draw_figure: Draws the figure; None if the training set cannot be read.
    """

    issues: list[DatasetIssue] = field(default_factory=list)
    statistics: dict[str, dict] = field(default_factory=dict)
    draw_figure: Callable[[], Image.Image] | None = None

    def with_severity(self, severity: str) -> list[DatasetIssue]:
        """Returns the errors or the warnings."""
        return [issue for issue in self.issues if issue.severity == severity]

    def __str__(self) -> str:
        lines = [f"{name}: {_format_statistics(statistics)}" for name, statistics in self.statistics.items()]
        for severity in (ERROR, WARNING):
            for kind, count in Counter(issue.kind for issue in self.with_severity(severity)).most_common():
                issues = [issue for issue in self.issues if issue.kind == kind]
                lines += ["", f"{severity}: {count} x {kind}: {issues[0].effect}"]
                lines += [f"  {issue}" for issue in issues[:MAX_PRINTED]]
                lines += [f"  and {count - MAX_PRINTED} more"] if count > MAX_PRINTED else []
        errors, warnings = len(self.with_severity(ERROR)), len(self.with_severity(WARNING))
        return "\n".join([*lines, "", f"{errors} errors, {warnings} warnings"])

    def save(self, folder: Path) -> None:
        """Writes check.json and, if there is a figure, check.png."""
        folder.mkdir(parents=True, exist_ok=True)
        json_file, figure_file = (folder / name for name in REPORT_FILES)
        content = {
            "errors": len(self.with_severity(ERROR)),
            "warnings": len(self.with_severity(WARNING)),
            "splits": self.statistics,
            "issues": [asdict(issue) | {"severity": issue.severity, "effect": issue.effect} for issue in self.issues],
        }
        json_file.write_text(json.dumps(content, indent=1) + "\n")
        if self.draw_figure is not None:
            self.draw_figure().save(figure_file)


def check_dataset(
    train: Split, val: Split | None, follow_links: bool = False, max_objects: int = 100, num_workers: int = 0
) -> DatasetReport:
    """Reads all annotations and decodes all images.

    Args:
        train: Training split.
        val: Validation split, None if there is none or if it equals `train`.
        follow_links: Whether to open images behind symbolic links that leave the folder of images.
        max_objects: Largest number of objects in a token sequence, drawn in the figure; 0 for the recommended one.
        num_workers: Processes that decode images.

    Returns:
        The report. A file that cannot be read at all is an issue in it.
    """
    report = DatasetReport()
    loaded: dict[str, Annotations] = {}
    digests: dict[str, dict[str, list[int]]] = {}
    for name, split in (("train", train), ("val", val)):
        if split is None:
            continue
        try:
            categories = loaded["train"].categories if "train" in loaded else None
            loaded[name] = load_annotations(split, categories, follow_links)
        except UserError as error:
            reason = str(error).removeprefix(f"{split.json}: ")
            report.issues.append(DatasetIssue("unusable", str(split.json), "", reason))
            continue
        report.issues += loaded[name].issues
        digests[name], issues = _inspect_images(loaded[name], f"checking {name}", num_workers)
        report.issues += issues
        report.statistics[name] = _compute_statistics(loaded[name])
    for name, annotations in loaded.items():
        if not annotations.trainable.any():
            value = f"none of the {len(annotations)} images of {name} has an object"
            report.issues.append(DatasetIssue("no-objects", str(annotations.split.json), "", value))
    if "train" in loaded:
        report.issues += _find_class_issues(loaded["train"])
        report.draw_figure = partial(_draw_figure, loaded, max_objects)
    for digest in digests.get("train", {}).keys() & digests.get("val", {}).keys():
        value = f"has the same pixels as {loaded['train'].name(digests['train'][digest][0])}"
        for index in digests["val"][digest]:
            name = sanitize(str(loaded["val"].file_names[index]))
            report.issues.append(DatasetIssue("leak", str(loaded["val"].split.images), name, value))
    report.issues.sort(key=lambda issue: (issue.kind, issue.file, issue.entry))
    return report


@dataclass
class _ImageInspector(Dataset):
    """Decodes images. An item is (index, issues as (kind, value), digest of the pixels or None)."""

    annotations: Annotations

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[int, list[tuple[str, str]], str | None]:
        if index in self.annotations.bad_images:
            return index, [], None  # `annotations.issues` has it
        issues = []
        try:
            file = self.annotations.image_file(index)
            annotated_size = tuple(self.annotations.sizes[index].tolist())
            issues = _find_header_issues(file, str(self.annotations.file_names[index]), annotated_size)
            pixels = file.pixels().contiguous()
        except BadImageError as error:
            return index, [*issues, (error.kind, error.reason)], None
        digest = hashlib.blake2b(pixels.numpy().data, digest_size=16, key=str(tuple(pixels.shape)).encode())
        return index, issues, digest.hexdigest()


def _inspect_images(
    annotations: Annotations, description: str, num_workers: int
) -> tuple[dict[str, list[int]], list[DatasetIssue]]:
    """Returns the indices of the images by their digest, and the issues of the files."""
    by_digest: dict[str, list[int]] = {}
    issues, folder = [], str(annotations.split.images)
    names = annotations.file_names.tolist()
    loader = DataLoader(_ImageInspector(annotations), batch_size=None, num_workers=num_workers)
    for index, image_issues, digest in progress(loader, description):
        issues += [DatasetIssue(kind, folder, sanitize(names[index]), value) for kind, value in image_issues]
        if digest is not None:
            by_digest.setdefault(digest, []).append(index)
    for first, *others in by_digest.values():
        value = f"has the same pixels as {sanitize(names[first])}"
        for name in (names[index] for index in others if names[index] != names[first]):
            issues.append(DatasetIssue("duplicate-image", folder, sanitize(name), value))
    return by_digest, issues


def _find_header_issues(file: ImageFile, name: str, annotated_size: tuple[int, int]) -> list[tuple[str, str]]:
    """Returns (kind, value) of the issues in an image's header, given its annotated (height, width), 0 if unknown."""
    image, issues = file.header, []
    expected = FORMATS_OF_SUFFIX.get(Path(name).suffix.lower())
    if expected is not None and image.format not in expected:
        issues.append(("suffix-differs", f"a {image.format} file"))
    mode = image.mode
    # Pillow reports 16-bit RGB as 8-bit; only the arguments of its decoder have the real depth.
    if ";16" in mode or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        issues.append(("16-bit", f"mode {mode}"))
    elif mode in ("1", "L", "LA"):
        issues.append(("grayscale", f"mode {mode}"))
    elif mode in ("P", "PA"):
        issues.append(("palette", f"mode {mode}"))
    elif mode == "CMYK":
        issues.append(("cmyk", f"mode {mode}"))
    elif mode not in ("RGB", "RGBA", "I", "F"):  # the last two cannot be decoded, which is another issue
        issues.append(("other-colors", f"mode {mode}"))
    if getattr(image, "is_animated", False):
        issues.append(("animated", f"{getattr(image, 'n_frames', 1)} frames"))
    if mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        issues.append(("transparent", f"mode {mode}"))
    file_size = (image.height, image.width)
    if min(annotated_size) == 0:
        issues.append(("size-unknown", "width and height are not whole numbers in the annotation file"))
    elif not file.is_transposed and annotated_size != file_size:
        annotated, actual = (f"{width} x {height}" for height, width in (annotated_size, file_size))
        issues.append(("size-differs", f"{annotated} in the annotation file, {actual} in the image file"))
    if file.is_transposed:
        issues.append(("exif-applied", f"EXIF orientation {file.orientation}"))
    elif file.orientation != 1:
        relation = "as stored" if annotated_size == file_size else "another" if min(annotated_size) > 0 else "unknown"
        issues.append(("exif-ignored", f"EXIF orientation {file.orientation}, but its annotated size is {relation}"))
    return issues


def _find_class_issues(annotations: Annotations) -> list[DatasetIssue]:
    file, issues = str(annotations.split.json), []
    id_of_name: dict[str, int] = {}
    categories, counts = annotations.categories, _count_by_class(annotations)
    for category_id, name, count in zip(categories.ids, categories.names, counts, strict=True):
        entry = f"category {category_id}"
        if (first := id_of_name.setdefault(name, category_id)) != category_id:
            issues.append(DatasetIssue("class-name-twice", file, entry, f"{name!r} is also category {first}"))
        if count == 0 and counts.any():
            issues.append(DatasetIssue("class-unused", file, entry, f"{name!r} has no object"))
    return issues


def _compute_statistics(annotations: Annotations) -> dict:
    categories, counts = annotations.categories, _count_by_class(annotations)
    objects, box_sizes = _objects_per_image(annotations), _box_sizes(annotations)
    return {
        "images": len(annotations),
        "images_without_objects": int((objects == 0).sum()),
        "objects": int(counts.sum()),
        "crowds": int(annotations.crowd.sum()),
        "boxes_without_area": int((~annotations.trainable & ~annotations.crowd).sum()),
        "max_objects_per_image": int(objects.max()),
        "median_box_size": float(np.median(box_sizes)) if len(box_sizes) else 0.0,
        "objects_by_class": [
            {"id": category_id, "name": name, "objects": int(count)}
            for category_id, name, count in zip(categories.ids, categories.names, counts, strict=True)
        ],
    }


def _format_statistics(statistics: dict) -> str:
    return (
        f"{statistics['images']} images ({statistics['images_without_objects']} without objects), "
        f"{statistics['objects']} objects of {len(statistics['objects_by_class'])} classes, at most "
        f"{statistics['max_objects_per_image']} per image, median box size {statistics['median_box_size']:.0f} pixels"
    )


def _count_by_class(annotations: Annotations) -> np.ndarray:
    return np.bincount(annotations.labels[annotations.trainable], minlength=len(annotations.categories.ids))


def _objects_per_image(annotations: Annotations) -> np.ndarray:
    return np.diff(np.append(0, np.cumsum(annotations.trainable))[annotations.offsets])


def _box_sizes(annotations: Annotations) -> np.ndarray:
    """Square roots of the areas of the trainable boxes, in pixels."""
    boxes = annotations.boxes[annotations.trainable].astype(np.float64)
    return np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))


def _draw_figure(loaded: dict[str, Annotations], max_objects: int) -> Image.Image:
    train, examples = loaded["train"], []
    for index in range(len(train)):
        try:
            image = to_pil_image(train.image_file(index).pixels())
        except BadImageError:
            continue
        boxes, labels = train.objects(index)
        image, boxes = enlarge(image, boxes, CELL)
        names = [train.categories.names[label] for label in labels]
        examples.append(draw_boxes(image, boxes, names, [color_of(label) for label in labels]))
        if len(examples) == NUM_EXAMPLES:
            break
    splits = {
        name: SplitSummary(
            class_counts=_count_by_class(annotations),
            box_sizes=_box_sizes(annotations),
            objects_per_image=_objects_per_image(annotations),
        )
        for name, annotations in loaded.items()
    }
    max_objects = max_objects or recommended_sizes(train)["max_objects"]
    return dataset_overview(train.categories.names, splits, examples, max_objects)
