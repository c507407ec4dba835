"""YOLO and Pascal VOC datasets as COCO annotation files. No image is copied, moved or changed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pix2seq.data.convert.files import Classes, SourceImage, absolute
from pix2seq.data.convert.voc import read_voc
from pix2seq.data.convert.yolo import read_yolo
from pix2seq.data.faults import is_text
from pix2seq.errors import UserError

# What the "info" of a file written here says; any other file is somebody's and is not overwritten.
MARKER = "converted by pix2seq"


@dataclass(frozen=True)
class Converted:
    """A split that was written: its name (train, val, ...), where its pictures lie, its annotation file, and whether
    both are found under one root."""

    name: str
    images: Path
    json: Path
    num_images: int
    num_objects: int
    linked: bool


def convert(source: str | Path, output: str | Path) -> list[Converted]:
    """Writes output/annotations/instances_{train,val,...}2017.json for each split of the dataset at `source`, and
    where that is possible a link output/images/{train,val,...}2017 to its pictures: COCO's layout, without a copy.

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
    source, output = absolute(source), absolute(output)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    config = next((source / name for name in ("data.yaml", "data.yml") if (source / name).is_file()), None)
    splits, categories = read_voc(source) if config is None else read_yolo(config)
    targets = {name: output / "annotations" / f"instances_{name}2017.json" for name in splits}
    for target in targets.values():
        if target.exists() and not _is_ours(target):
            raise UserError(f"{target}: is there and was not written by a conversion; choose another folder")
    return [_write(name, pictures, categories, targets[name]) for name, pictures in splits.items()]


def _write(name: str, pictures: list[SourceImage], categories: Classes, target: Path) -> Converted:
    folder = Path(os.path.commonpath([picture.path.parent for picture in pictures]))
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, start=1):
        (width, height), file_name = picture.size, picture.path.relative_to(folder).as_posix()
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        if not is_text(file_name):
            raise UserError(
                f"{ascii(str(picture.path))}: its name is not UTF-8, which annotation files are; rename it"
            )
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
    linked = _link(target.parents[1] / "images" / f"{name}2017", folder)
    return Converted(name, folder, target, len(images), len(annotations), linked)


def _link(link: Path, folder: Path) -> bool:
    """Whether the link leads to the folder now. It is put neither into the folder nor beside anything but links."""
    try:
        link.parent.mkdir(exist_ok=True)
        if folder in link.parents or not all(path.is_symlink() for path in link.parent.iterdir()):
            return False
        if link.is_symlink():
            link.unlink()
        link.symlink_to(folder, target_is_directory=True)
    except OSError:  # the disk has no links
        return False
    return True


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_bytes())["info"]["description"] == MARKER
    except (OSError, ValueError, LookupError, TypeError):
        return False
