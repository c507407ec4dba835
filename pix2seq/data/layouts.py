"""Dataset layouts: the locations of the splits of COCO and Roboflow datasets."""

from dataclasses import dataclass
from pathlib import Path

from pix2seq.errors import UserError

ROBOFLOW_JSON = "_annotations.coco.json"
ROBOFLOW_FOLDERS = {"train": ("train",), "val": ("valid", "val")}
SHARDS_JSON = "annotations.json"


@dataclass(frozen=True)
class Split:
    """The files of a split.

    Args:
        images: A folder of images, or of shards.
        json: The COCO annotation file.
    """

    images: Path
    json: Path


def find_split(
    name: str,
    root: str | Path | None,
    images: str | None = None,
    json: str | None = None,
    shards: str | None = None,
) -> Split:
    """Locates a split by the values of the dataset flags.

    Args:
        name: "train" or "val".
        root: Folder of the dataset, see `find_split_in_root`.
        images: Folder of the images, for other layouts.
        json: Annotation file, for other layouts.
        shards: Folder that `pix2seq shard` wrote; has priority.

    Raises:
        UserError: The split does not exist.
    """
    if shards is not None:
        if not (Path(shards) / SHARDS_JSON).is_file():
            raise UserError(
                f"--{name}_shards {shards}: has no {SHARDS_JSON}; name a folder that `pix2seq shard` wrote"
            )
        return Split(Path(shards), Path(shards) / SHARDS_JSON)
    if images is not None and json is not None:
        return Split(Path(images), Path(json))
    if root is None:
        raise UserError(f"--root: missing; name the dataset, or its --{name}_images and --{name}_json")
    return find_split_in_root(root, name)


def find_split_in_root(root: str | Path, name: str) -> Split:
    """Locates a split in a folder with the layout of COCO or of a COCO export of Roboflow.

    COCO has annotations/instances_{name}2017.json, and images/{name}2017/ or {name}2017/. Roboflow has
    {train,valid}/_annotations.coco.json in the folder of the images.

    Raises:
        UserError: The split does not exist.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    annotations = root / "annotations" / f"instances_{name}2017.json"
    if annotations.is_file():
        folders = root / "images" / f"{name}2017", root / f"{name}2017"
        for images in folders:
            if images.is_dir():
                return Split(images, annotations)
        for archive in (folder.with_suffix(".zip") for folder in folders):
            if archive.is_file():
                raise UserError(f"--root {root}: {archive.relative_to(root)} is a zip archive; unpack it where it is")
        raise UserError(f"--root {root}: neither images/{name}2017 nor {name}2017 is a folder")
    for folder_name in ROBOFLOW_FOLDERS[name]:
        images = root / folder_name
        if (images / ROBOFLOW_JSON).is_file():
            return Split(images, images / ROBOFLOW_JSON)
    missing = f"--root {root}: {annotations.relative_to(root)} is missing"
    if _is_convertible(root):
        raise UserError(
            f"{missing}. It looks like YOLO or Pascal VOC: `pix2seq convert {root} OUT` writes COCO annotation files "
            "and leaves the images where they are"
        )
    raise UserError(f"{missing} (COCO), and so is {ROBOFLOW_FOLDERS[name][0]}/{ROBOFLOW_JSON} (Roboflow)")


def _is_convertible(root: Path) -> bool:
    if any((root / name).exists() for name in ("data.yaml", "data.yml", "Annotations", "JPEGImages")):
        return True
    return any(next((root / folder).glob("*.xml"), None) for folder in ("train", "valid", "val"))
