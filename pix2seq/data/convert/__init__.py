"""Conversion of YOLO and Pascal VOC datasets to COCO annotation files. No image is copied, moved or changed.

hotcoco 1.3 reads both formats too, but loses data without an error. From YOLO, it omits images without a label file,
subfolders, and the suffixes of file names; it refuses polygons and does not read the splits. From Pascal VOC, it cuts
class names at `&amp;`, accepts truncated XML, marks difficult objects as crowds, and ignores subfolders and
ImageSets/. It accepts NaN in both. tests/test_convert.py shows these cases.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pix2seq.data.convert.source_folder import Classes, SourceFolder, SourceImage, absolute
from pix2seq.data.convert.voc import read_voc
from pix2seq.data.convert.yolo import read_yolo
from pix2seq.data.issues import is_text
from pix2seq.errors import UserError

MARKER = "converted by pix2seq"  # the description in "info"; files without it are never overwritten


@dataclass(frozen=True)
class ConvertedSplit:
    """A split that `convert` wrote.

    Args:
        name: "train", "val", "test" or "trainval".
        images: Folder of its images, at any depth.
        json: Its annotation file.
        num_images: Number of images.
        num_objects: Number of objects.
        linked: Whether a link in COCO's layout leads to the images, so that the output is a `--root`.
    """

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
    notify: Callable[[str], None] = lambda message: None,
) -> list[ConvertedSplit]:
    """Converts a dataset to COCO's layout.

    Writes `output/annotations/instances_{train,val,...}2017.json` for each split and, where possible, links
    `output/images/{train,val,...}2017` to the images. A folder with a data.yaml is read as YOLO (`read_yolo`), all
    others as Pascal VOC (`read_voc`). Boxes are neither rounded nor clipped. All files of an earlier conversion are
    removed.

    Args:
        source: Folder of the dataset.
        output: Folder to write to.
        follow_links: Whether to open files outside `source`, behind symbolic links or in lists of images.
        notify: Called with a message about each kind of file that is omitted.

    Returns:
        The splits.

    Raises:
        UserError: The dataset cannot be read, or the output has annotation files from elsewhere. Nothing is written.
    """
    source, output = absolute(source), absolute(output)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if os.path.realpath(source) == os.path.realpath(output):
        raise UserError(f"{output}: is the folder of the dataset to convert; name another folder to write to")
    config = next((source / name for name in ("data.yaml", "data.yml") if (source / name).is_file()), None)
    dataset = SourceFolder(source, follow_links, notify)
    splits, classes = read_voc(dataset) if config is None else read_yolo(config, dataset)
    folder = output / "annotations"
    paths = {name: folder / f"instances_{name}2017.json" for name in splits}
    for path in paths.values():
        if path.exists() and not _is_converted(path):
            raise UserError(f"{path}: exists and was not written by a conversion; choose another folder")
    contents = {name: _to_coco(name, images, classes) for name, images in splits.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            path.with_suffix(".unfinished").write_text(json.dumps(contents[name][1]))
        # Remove all old files before the first new one appears: splits of two datasets never stand side by side.
        for old in filter(_is_converted, folder.glob("instances_*2017.json")):
            link = output / "images" / old.stem.removeprefix("instances_")
            if link.is_symlink() and os.readlink(link) == _read_info(old).get("images"):
                link.unlink()
            old.unlink()
        for path in paths.values():
            os.replace(path.with_suffix(".unfinished"), path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None
    return [
        ConvertedSplit(
            name=name,
            images=images,
            json=paths[name],
            num_images=len(content["images"]),
            num_objects=len(content["annotations"]),
            linked=_link(output / "images" / f"{name}2017", images),
        )
        for name, (images, content) in contents.items()
    ]


def _to_coco(split: str, source_images: list[SourceImage], classes: Classes) -> tuple[Path, dict]:
    """Returns the common folder of the images, and the content of the annotation file."""
    folder = Path(os.path.commonpath([image.path.parent for image in source_images]))
    if folder == Path(folder.anchor):
        folders = f"{source_images[0].path.parent} and {source_images[-1].path.parent}"
        raise UserError(f"{split}: its images are in {folders}, which have no common folder; move them into one")
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id, image in enumerate(source_images, start=1):
        (width, height), file_name = image.size, image.path.relative_to(folder).as_posix()
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        if not is_text(file_name):
            raise UserError(f"{str(image.path)!a}: the name is not UTF-8, as COCO requires; rename the file")
        for name, box in image.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": classes[name][0],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": MARKER, "images": str(folder)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in classes.values()],
    }
    return folder, content


def _link(link: Path, folder: Path) -> bool:
    """Links to a folder, but not from inside it, over another link, or among real images. Returns whether it did."""
    try:
        link.parent.mkdir(exist_ok=True)
        siblings = [path for path in link.parent.iterdir() if not path.name.startswith(".")]
        if folder in link.parents or link.is_symlink() or not all(path.is_symlink() for path in siblings):
            return False
        link.symlink_to(folder, target_is_directory=True)
    except OSError:  # the file system has no links
        return False
    return True


def _is_converted(path: Path) -> bool:
    return _read_info(path).get("description") == MARKER


def _read_info(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_bytes())["info"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}
