"""YOLO and Pascal VOC datasets as COCO annotation files. No image is copied, moved or changed."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pix2seq.data.convert.files import Classes, Source, SourceImage, absolute
from pix2seq.data.convert.voc import read_voc
from pix2seq.data.convert.yolo import read_yolo
from pix2seq.data.issues import is_text
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


def convert(
    source: str | Path,
    output: str | Path,
    follow_links: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Converted]:
    """Writes output/annotations/instances_{train,val,...}2017.json for each split of the dataset at `source`, and
    where that is possible a link output/images/{train,val,...}2017 to its pictures: COCO's layout, without a copy.

    A folder with a data.yaml is a YOLO dataset. One with Annotations/, JPEGImages/ and, for the splits,
    ImageSets/Main/ is Pascal VOC, and so is one with XML files beside the pictures, in train/, valid/ and test/ or
    directly. Class ids are the same in all splits. File names are relative to `Converted.images`, the folder that
    holds the split's pictures, at whatever depth. Boxes are neither rounded nor clipped. `tell` is given a line about
    whatever is left out. What lies outside `source` is opened with `follow_links` only. What an earlier conversion
    left in `output` is replaced, splits that are no more included. Raises UserError, and then no file of another
    origin has been touched.

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
    dataset = Source(source, follow_links, tell)
    splits, categories = read_voc(dataset) if config is None else read_yolo(config, dataset)
    folder = output / "annotations"
    targets = {name: folder / f"instances_{name}2017.json" for name in splits}
    for target in targets.values():
        if target.exists() and not _is_ours(target):
            raise UserError(f"{target}: is there and was not written by a conversion; choose another folder")
    contents = {name: _content(name, pictures, categories) for name, pictures in splits.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, target in targets.items():
            target.with_suffix(".unfinished").write_text(json.dumps(contents[name][1]))
        # Old ones go before the first of the new ones comes: no split is ever of another dataset than the other.
        for old in filter(_is_ours, folder.glob("instances_*2017.json")):
            link = output / "images" / old.stem.removeprefix("instances_")
            if link.is_symlink() and os.readlink(link) == _folder_of(old):
                link.unlink()
            old.unlink()
        for target in targets.values():
            os.replace(target.with_suffix(".unfinished"), target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    return [
        Converted(
            *(name, images, targets[name], len(content["images"]), len(content["annotations"])),
            linked=_link(output / "images" / f"{name}2017", images),
        )
        for name, (images, content) in contents.items()
    ]


def _content(name: str, pictures: list[SourceImage], categories: Classes) -> tuple[Path, dict]:
    """The folder that holds a split's pictures, and its annotation file."""
    folder = Path(os.path.commonpath([picture.path.parent for picture in pictures]))
    if folder == Path(folder.anchor):
        where = f"{pictures[0].path.parent} and {pictures[-1].path.parent}"
        raise UserError(f"{name}: its pictures lie in {where}, which have no folder in common but {folder}")
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, start=1):
        (width, height), file_name = picture.size, picture.path.relative_to(folder).as_posix()
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        if not is_text(file_name):
            raise UserError(f"{str(picture.path)!a}: its name is not UTF-8, which annotation files are; rename it")
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
        "info": {"description": MARKER, "images": str(folder)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in categories.values()],
    }
    return folder, content


def _link(link: Path, folder: Path) -> bool:
    """Whether the link leads to the folder now. It takes nobody's place, and is put neither into the folder nor beside
    anything but links."""
    try:
        link.parent.mkdir(exist_ok=True)
        beside = (path for path in link.parent.iterdir() if not path.name.startswith("."))
        if folder in link.parents or not all(path.is_symlink() for path in beside) or link.is_symlink():
            return False
        link.symlink_to(folder, target_is_directory=True)
    except OSError:  # the disk has no links
        return False
    return True


def _is_ours(path: Path) -> bool:
    return _info(path).get("description") == MARKER


def _folder_of(path: Path) -> str | None:
    """Where the images of an earlier conversion lie."""
    return _info(path).get("images")


def _info(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_bytes())["info"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
