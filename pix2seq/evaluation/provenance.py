"""What predictions in a folder were scored against: the arguments of `load_ground_truth`, beside them."""

import json
from pathlib import Path

import numpy as np

from pix2seq.data import Categories
from pix2seq.data.coco import read_json
from pix2seq.errors import UserError
from pix2seq.scoring import load_ground_truth

FILE = "evaluation.json"
KEYS = {"ground_truth", "image_ids", "categories"}


def write_provenance(
    folder: Path, truth: str | Path, image_ids: np.ndarray | None = None, categories: Categories | None = None
) -> None:
    content = {
        "ground_truth": str(Path(truth).resolve()),
        "image_ids": None if image_ids is None else image_ids.tolist(),
        "categories": None if categories is None else {"ids": categories.ids, "names": categories.names},
    }
    (folder / FILE).write_text(json.dumps(content) + "\n")


def read_provenance(path: Path) -> dict | None:
    """None where the path is no folder that evaluate.py has written. Raises UserError."""
    if not (path / FILE).is_file():
        return None
    content = read_json(path / FILE)
    if not isinstance(content, dict) or KEYS - content.keys():
        raise UserError(f"{path / FILE}: is not what evaluate.py writes; name the annotation file with --gt")
    return content


def load_truth(provenance: dict) -> dict:
    ids, categories = provenance["image_ids"], provenance["categories"]
    return load_ground_truth(
        provenance["ground_truth"],
        None if ids is None else np.array(ids, dtype=np.int64),
        None if categories is None else Categories(tuple(categories["ids"]), tuple(categories["names"])),
    )
