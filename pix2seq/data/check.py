"""Everything that is wrong with a dataset, by name, and what it holds: before any training, and without a model."""

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

from pix2seq.charts import dataset_overview
from pix2seq.data.coco import Annotations, load_annotations
from pix2seq.data.image_files import FORMATS_OF_SUFFIX, BadImageError, ImageFile
from pix2seq.data.issues import ERROR, WARNING, DatasetIssue, shown
from pix2seq.data.layouts import Split
from pix2seq.errors import UserError
from pix2seq.progress import progress
from pix2seq.visualization import CELL, color_of, draw_boxes, enlarge

NUM_EXAMPLES = 8
SHOWN = 20  # faults of a kind that are printed; the JSON file has all of them


@dataclass
class Report:
    """faults, and of each split what it holds: see `_statistics`."""

    faults: list[DatasetIssue] = field(default_factory=list)
    statistics: dict[str, dict] = field(default_factory=dict)
    draw: Callable[[], Image.Image] | None = None

    def of(self, severity: str) -> list[DatasetIssue]:
        return [fault for fault in self.faults if fault.severity == severity]

    def __str__(self) -> str:
        lines = [f"{name}: {_line(statistics)}" for name, statistics in self.statistics.items()]
        for severity in (ERROR, WARNING):
            for kind, count in Counter(fault.kind for fault in self.of(severity)).most_common():
                faults = [fault for fault in self.faults if fault.kind == kind]
                lines += ["", f"{severity}: {count} x {kind}: {faults[0].effect}"]
                lines += [f"  {fault}" for fault in faults[:SHOWN]]
                lines += [f"  and {count - SHOWN} more"] if count > SHOWN else []
        return "\n".join([*lines, "", f"{len(self.of(ERROR))} errors, {len(self.of(WARNING))} warnings"])

    def write(self, folder: Path) -> None:
        """check.json and, if there was anything to draw, check.png."""
        folder.mkdir(parents=True, exist_ok=True)
        faults = [asdict(fault) | {"severity": fault.severity, "effect": fault.effect} for fault in self.faults]
        content = {
            "errors": len(self.of(ERROR)),
            "warnings": len(self.of(WARNING)),
            "splits": self.statistics,
            "faults": faults,
        }
        (folder / "check.json").write_text(json.dumps(content, indent=1) + "\n")
        if self.draw is not None:
            self.draw().save(folder / "check.png")


def check(
    train: Split, val: Split | None, follow_links: bool = False, max_objects: int = 100, num_workers: int = 0
) -> Report:
    """Reads every annotation and decodes every image. `val` is None where there is none, or where it is `train`."""
    report, loaded, digests = Report(), {}, {}
    for name, split in (("train", train), ("val", val)):
        if split is None:
            continue
        try:
            categories = loaded["train"].categories if "train" in loaded else None
            loaded[name] = load_annotations(split, categories, follow_links)
        except UserError as error:
            report.faults.append(
                DatasetIssue("unusable", str(split.json), "", str(error).removeprefix(f"{split.json}: "))
            )
            continue
        report.faults += loaded[name].faults
        digests[name], faults = _inspect_all(loaded[name], f"checking {name}", num_workers)
        report.faults += faults
        report.statistics[name] = _statistics(loaded[name])
    for name, annotations in loaded.items():
        if not annotations.trainable.any():
            value = f"{len(annotations)} images of {name} without an object"
            report.faults.append(DatasetIssue("no-objects", str(annotations.split.json), "", value))
    if "train" in loaded:
        report.faults += _faults_of_classes(loaded["train"])
        report.draw = partial(_picture, loaded, max_objects)
    for digest in digests.get("train", {}).keys() & digests.get("val", {}).keys():
        value = f"the same pixels as {loaded['train'].name(digests['train'][digest][0])}"
        for index in digests["val"][digest]:
            name = shown(str(loaded["val"].file_names[index]))
            report.faults.append(DatasetIssue("leak", str(loaded["val"].split.images), name, value))
    report.faults.sort(key=lambda fault: (fault.kind, fault.file, fault.entry))
    return report


@dataclass
class _Inspection(Dataset):
    """Of each image its faults, as (kind, value), and a digest of its pixels, None if it has none."""

    annotations: Annotations

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> tuple[int, list[tuple[str, str]], str | None]:
        if index in self.annotations.bad_images:
            return index, [], None  # told when the file was read
        faults = []
        try:
            picture = self.annotations.image_file(index)
            faults = _faults_of_header(
                picture, str(self.annotations.file_names[index]), tuple(self.annotations.sizes[index].tolist())
            )
            pixels = picture.pixels().contiguous()
        except BadImageError as bad:
            return index, [*faults, (bad.kind, bad.why)], None
        digest = hashlib.blake2b(pixels.numpy(), digest_size=16, key=str(tuple(pixels.shape)).encode())
        return index, faults, digest.hexdigest()


def _inspect_all(
    annotations: Annotations, what: str, num_workers: int
) -> tuple[dict[str, list[int]], list[DatasetIssue]]:
    """The images by their digests, and what is wrong with them."""
    found, faults, images = {}, [], str(annotations.split.images)
    loader = DataLoader(_Inspection(annotations), batch_size=None, num_workers=num_workers)
    for index, said, digest in progress(loader, what):
        faults += [
            DatasetIssue(kind, images, shown(str(annotations.file_names[index])), value) for kind, value in said
        ]
        if digest is not None:
            found.setdefault(digest, []).append(index)
    for indices in found.values():
        first = str(annotations.file_names[indices[0]])
        for index in indices[1:]:
            if (name := str(annotations.file_names[index])) != first:
                faults.append(
                    DatasetIssue("duplicate-image", images, shown(name), f"the same pixels as {shown(first)}")
                )
    return found, faults


def _faults_of_header(picture: ImageFile, name: str, annotated: tuple[int, int]) -> list[tuple[str, str]]:
    image, faults = picture.header, []
    expected = FORMATS_OF_SUFFIX.get(Path(name).suffix.lower())
    if expected is not None and image.format not in expected:
        faults.append(("suffix-differs", f"a {image.format} file"))
    mode = image.mode
    # Pillow opens 16-bit colour as 8-bit; only the decoder it is about to use tells.
    if ";16" in mode or any(";16" in str(tile[3]) for tile in image.tile):
        faults.append(("16-bit", f"mode {mode}"))
    elif mode in ("1", "L", "LA"):
        faults.append(("grey", f"mode {mode}"))
    elif mode in ("P", "PA"):
        faults.append(("palette", f"mode {mode}"))
    elif mode == "CMYK":
        faults.append(("cmyk", f"mode {mode}"))
    elif mode not in ("RGB", "RGBA", "I", "F"):  # the last two cannot be read
        faults.append(("other-colours", f"mode {mode}"))
    if getattr(image, "is_animated", False):
        faults.append(("animated", f"{image.n_frames} frames"))
    if mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        faults.append(("transparent", f"mode {mode}"))
    stored = (image.height, image.width)
    if min(annotated) == 0:
        faults.append(("size-unknown", "no whole numbers as width and height in the annotation file"))
    elif not picture.turned and annotated != stored:
        value = f"{annotated[1]} x {annotated[0]} in the annotation file, {stored[1]} x {stored[0]} in fact"
        faults.append(("size-differs", value))
    if picture.turned:
        faults.append(("exif-turned", f"EXIF orientation {picture.orientation}"))
    elif picture.orientation != 1:
        said = "as stored" if annotated == stored else "another" if min(annotated) > 0 else "unknown"
        faults.append(("exif-ignored", f"EXIF orientation {picture.orientation}, but its annotated size is {said}"))
    return faults


def _faults_of_classes(annotations: Annotations) -> list[DatasetIssue]:
    file, first, faults = str(annotations.split.json), {}, []
    counts = np.bincount(annotations.labels[annotations.trainable], minlength=len(annotations.categories.ids))
    for category_id, name, count in zip(*_columns(annotations), counts, strict=True):
        entry = f"category {category_id}"
        if first.setdefault(name, category_id) != category_id:
            faults.append(DatasetIssue("class-name-twice", file, entry, f"{name!r} is category {first[name]}, too"))
        if count == 0 and counts.any():
            faults.append(DatasetIssue("class-unused", file, entry, f"{name!r} has no object"))
    return faults


def _statistics(annotations: Annotations) -> dict:
    """What a split holds, as plain numbers."""
    labels = annotations.labels[annotations.trainable]
    counts = np.bincount(labels, minlength=len(annotations.categories.ids))
    objects = np.array([len(annotations.objects(index)[1]) for index in range(len(annotations))])
    widths, heights = _sides(annotations).T if len(labels) else (np.zeros(1), np.zeros(1))
    ids, names = _columns(annotations)
    return {
        "images": len(annotations),
        "images_without_objects": int((objects == 0).sum()),
        "objects": len(labels),
        "crowds": int(annotations.crowd.sum()),
        "without_area": int((~annotations.trainable & ~annotations.crowd).sum()),
        "most_objects_in_an_image": int(objects.max()),
        "median_side": float(np.median(np.sqrt(widths * heights))),
        "objects_by_class": [
            {"id": i, "name": n, "objects": int(c)} for i, n, c in zip(ids, names, counts, strict=True)
        ],
    }


def _line(statistics: dict) -> str:
    return (
        f"{statistics['images']} images ({statistics['images_without_objects']} without objects), "
        f"{statistics['objects']} objects of {len(statistics['objects_by_class'])} classes, at most "
        f"{statistics['most_objects_in_an_image']} in an image; the median box has the area of a square of "
        f"{statistics['median_side']:.0f} pixels"
    )


def _columns(annotations: Annotations) -> tuple[tuple[int, ...], tuple[str, ...]]:
    return annotations.categories.ids, annotations.categories.names


def _sides(annotations: Annotations) -> np.ndarray:
    """(width, height) of the boxes trained on, (M, 2), in pixels."""
    boxes = annotations.boxes[annotations.trainable].astype(np.float64)
    return boxes[:, 2:] - boxes[:, :2]


def _picture(loaded: dict[str, Annotations], max_objects: int) -> Image.Image:
    train = loaded["train"]
    counts = {name: np.bincount(a.labels[a.trainable], minlength=len(a.categories.ids)) for name, a in loaded.items()}
    objects = {name: np.diff(np.append(0, np.cumsum(a.trainable))[a.offsets]) for name, a in loaded.items()}
    examples, index = [], 0
    while len(examples) < NUM_EXAMPLES and index < len(train):
        boxes, labels = train.objects(index)
        try:
            large, boxes = enlarge(to_pil_image(train.image_file(index).pixels()), boxes, CELL)
            names = [train.categories.names[label] for label in labels]
            examples.append(draw_boxes(large, boxes, names, [color_of(label) for label in labels]))
        except BadImageError:
            pass
        index += 1
    sides = {name: np.sqrt(np.prod(_sides(a), axis=1)) for name, a in loaded.items()}
    return dataset_overview(train.categories.names, counts, sides, objects, examples, max_objects)
