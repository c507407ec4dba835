"""Where the splits of a dataset lie: the layouts that are read as they are."""

from dataclasses import dataclass
from pathlib import Path

from pix2seq.errors import UserError


@dataclass(frozen=True)
class Split:
    """One split of a dataset: its images (a folder, a zip archive or a folder of shards: see images.open_store), and
    its COCO annotation file."""

    images: Path
    json: Path


# Names of a split's folder in the exports of Roboflow.
_ROBOFLOW = {"train": ("train",), "val": ("valid", "val")}
ROBOFLOW_JSON = "_annotations.coco.json"
SHARDS_JSON = "annotations.json"


def find_split(
    name: str, root: str | None, images: str | None = None, json: str | None = None, shards: str | None = None
) -> Split:
    """One split by the flags that name a dataset: `name` (train or val) under a root, or folder and file, or shards.

    Raises UserError if it is not there.
    """
    if shards is not None:
        if not (Path(shards) / SHARDS_JSON).is_file():
            raise UserError(f"--{name}_shards {shards}: holds no {SHARDS_JSON} (`python -m pix2seq shard` does)")
        return Split(Path(shards), Path(shards) / SHARDS_JSON)
    return split_of_root(root, name) if json is None else Split(Path(images), Path(json))


def split_of_root(root: str | Path, name: str) -> Split:
    """A split (train or val) of a folder in COCO's layout or Roboflow's.

    COCO: annotations/instances_{name}2017.json, and images/{name}2017/ or, as the archives unpack, {name}2017/, or an
    archive that was left as it is, {name}2017.zip. Roboflow: {train,valid}/_annotations.coco.json among the images.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    annotations = root / "annotations" / f"instances_{name}2017.json"
    if annotations.is_file():
        for images in (root / "images" / f"{name}2017", root / f"{name}2017"):
            for path in (images, images.with_name(images.name + ".zip")):
                if path.exists():
                    return Split(path, annotations)
        raise UserError(f"--root {root}: neither images/{name}2017 nor {name}2017 is a folder, or a zip archive")
    for folder in _ROBOFLOW[name]:
        if (root / folder / ROBOFLOW_JSON).is_file():
            return Split(root / folder, root / folder / ROBOFLOW_JSON)
    if _looks_convertible(root):
        raise UserError(
            f"--root {root}: {annotations.relative_to(root)} is missing. It looks like YOLO or Pascal VOC: `python -m "
            f"pix2seq.data convert {root} OUT` writes COCO files for it, and leaves its images where they are"
        )
    raise UserError(
        f"--root {root}: {annotations.relative_to(root)} is missing (COCO), and so is "
        f"{_ROBOFLOW[name][0]}/{ROBOFLOW_JSON} (Roboflow)"
    )


def _looks_convertible(root: Path) -> bool:
    if any((root / name).exists() for name in ("data.yaml", "data.yml", "Annotations", "JPEGImages")):
        return True
    return any(next((root / folder).glob("*.xml"), None) for folder in ("train", "valid", "val"))
