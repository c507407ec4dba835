"""Predictions against ground truth: COCO numbers, which are pycocotools'.

Both are checked first, for pycocotools misreads some files without a word.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import hotcoco
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.data.coco import Categories, read_coco, read_json
from pix2seq.data.issues import DatasetIssue, is_finite, is_id, shown, usable_images, usable_objects
from pix2seq.errors import UserError

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
METRICS += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
# What is read of a ground truth; of the rest, hotcoco refuses some values that nobody needs.
SCORED_KEYS = {
    "images": ("id",),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
RESULT_KEYS = ("image_id", "category_id", "bbox", "score")  # pycocotools takes others for another task


def load_ground_truth(
    path: str | Path,
    image_ids: np.ndarray | None = None,
    categories: Categories | None = None,
    warn: Callable[[list[DatasetIssue]], None] | None = None,
) -> dict:
    """A COCO annotation file made fit for pycocotools, which misreads some files without a word.

    Annotation ids are numbered from 1 (it ignores matches of id 0), a missing `area` or `iscrowd` is filled in, and
    entries that cannot be used are left out, the same ones as from training; `warn` is told which, if there are any.
    With `image_ids`, only those images and their annotations. With `categories`, these are its classes, more than the
    file names perhaps: a model may find what the file knows nothing of. Raises UserError.
    """
    truth = read_coco(Path(path))
    truth["images"], faults = usable_images(truth["images"], Path(path))
    known = categories.ids if categories is not None else [category["id"] for category in truth["categories"]]
    truth["annotations"], wrong = usable_objects(
        truth["annotations"], (image["id"] for image in truth["images"]), known, Path(path)
    )
    if (faults or wrong) and warn is not None:
        warn(faults + wrong)
    if image_ids is not None:
        wanted = set(image_ids.tolist())
        truth["images"] = [image for image in truth["images"] if image["id"] in wanted]
        truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in wanted]
    for number, annotation in enumerate(truth["annotations"], start=1):
        annotation["id"] = number
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
        if not is_finite(annotation.get("area")):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    if categories is not None:
        truth["categories"] = [{"id": i, "name": n} for i, n in zip(categories.ids, categories.names, strict=True)]
    return truth


def load_predictions(path: str | Path) -> list[dict]:
    """A COCO results file, unchecked: see `check_predictions`."""
    return read_json(Path(path), name=f"--predictions {path}")


def check_predictions(predictions: list[dict], truth: dict, name: str = "predictions") -> None:
    """Raises UserError for what pycocotools would score wrongly or die of, with the number of cases."""
    if not isinstance(predictions, list):
        raise UserError(f"{name}: a COCO results file is a list of objects")
    image_ids = {image["id"] for image in truth["images"]}
    category_ids = {category["id"] for category in truth["categories"]}
    faults: dict[str, list] = {}
    for number, row in enumerate(predictions):
        fault = _prediction_fault(row, image_ids, category_ids)
        if fault:
            faults.setdefault(fault, []).append(number)
    if faults:
        raise UserError(
            f"{name}: "
            + "; ".join(
                f"{len(rows)} of {len(predictions)} {fault}, first entry {rows[0]}" for fault, rows in faults.items()
            )
        )


def _prediction_fault(row, image_ids: set, category_ids: set) -> str | None:
    if not isinstance(row, dict) or not {"image_id", "category_id", "bbox", "score"} <= row.keys():
        return "lack image_id, category_id, bbox or score"
    if not is_id(row["image_id"]) or row["image_id"] not in image_ids:
        return f"name an image that is not in the ground truth ({row['image_id']!r})"
    if not is_id(row["category_id"]) or row["category_id"] not in category_ids:
        return f"name a category that is not in the ground truth ({row['category_id']!r})"
    box = row["bbox"]
    numbers = [*box, row["score"]] if isinstance(box, list) and len(box) == 4 else [None]
    if not all(is_finite(v) for v in numbers):
        return "have a box or score that is not made of finite numbers"
    return None


def coco_metrics(
    truth: dict, predictions: list[dict], name: str = "predictions", backend: Literal["fast", "pycocotools"] = "fast"
) -> dict[str, float]:
    """The 12 COCO numbers by the names in METRICS, and `per_class/<name>`: AP of each class.

    As in pycocotools, -1 where there is nothing to find (no large objects, say). Raises UserError, in which
    the predictions are called `name`. `fast` is hotcoco, whose numbers are the same and come many times sooner.
    """
    check_predictions(predictions, truth, name)
    name_of = class_names(truth)
    evaluation = _evaluated(truth, [{key: row[key] for key in RESULT_KEYS} for row in predictions], backend)
    metrics = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    precision = evaluation.eval["precision"]  # (IoU thresholds, recalls, classes, areas, max detections)
    for index, category_id in enumerate(evaluation.params.catIds):
        values = precision[:, :, index, 0, -1]
        values = values[values > -1]
        metrics[f"per_class/{name_of[category_id]}"] = float(values.mean()) if values.size else -1.0
    return metrics


def _evaluated(truth: dict, rows: list[dict], backend: str):
    """A COCOeval, hotcoco's or pycocotools', that has done its work."""
    ids = [entry["id"] for key in ("images", "categories") for entry in truth[key]]
    if backend == "fast" and min(ids) >= 0:  # hotcoco knows no negative ones
        return evaluate_fast(truth, rows)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = truth
        ground_truth.createIndex()
        # Neither can load an empty list of results, but both can evaluate one.
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(rows) if rows else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def evaluate_fast(truth: dict, rows: list[dict], areas: dict[str, tuple[float, float]] | None = None):
    """hotcoco's COCOeval after its work, by other classes of area (name: from, to) than COCO's if `areas` has them.

    No id may be negative. With `areas` there are no `stats`, for these are of COCO's.
    """
    truth = {key: [{k: entry[k] for k in kept} for entry in truth[key]] for key, kept in SCORED_KEYS.items()}
    # It warns, at every call, of names that are empty, and nothing here reads them.
    truth["categories"] = [{"id": entry["id"], "name": str(entry["id"])} for entry in truth["categories"]]
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = hotcoco.COCO(truth)
        found = ground_truth.load_res(rows) if rows else hotcoco.COCO(truth | {"annotations": []})
        evaluation = hotcoco.COCOeval(ground_truth, found, "bbox")
        if areas is not None:
            evaluation.params.areaRng = [list(borders) for borders in areas.values()]
            evaluation.params.areaRngLbl = list(areas)
        evaluation.evaluate()
        evaluation.accumulate()
        if areas is None:
            evaluation.summarize()
    return evaluation


def remap_ids(truth: dict, predictions: list[dict]) -> tuple[dict, list[dict]]:
    """Copies whose image, class and annotation ids count from 1, in the order of the ids: which changes no number,
    makes an id a place in a list, and suits hotcoco, whatever the ids were."""
    images = sorted(truth["images"], key=lambda image: image["id"])
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    image_of = {image["id"]: number for number, image in enumerate(images, start=1)}
    category_of = {category["id"]: number for number, category in enumerate(categories, start=1)}

    def moved(entry: dict) -> dict:
        return {"image_id": image_of[entry["image_id"]], "category_id": category_of[entry["category_id"]]}

    return {
        "images": [image | {"id": number} for number, image in enumerate(images, start=1)],
        "categories": [category | {"id": number} for number, category in enumerate(categories, start=1)],
        "annotations": [
            entry | moved(entry) | {"id": number} for number, entry in enumerate(truth["annotations"], start=1)
        ],
    }, [{"bbox": row["bbox"], "score": row["score"]} | moved(row) for row in predictions]


def box_ious(found: list, objects: list, crowd: bool = False) -> np.ndarray:
    """IoU (p, g) of boxes xywh, as COCO computes it; of crowds, the share of what was found that lies in them."""
    if not len(found) or not len(objects):
        return np.zeros((len(found), len(objects)))
    return hotcoco.primitives.bbox_iou(np.array(found, float), np.array(objects, float), [crowd] * len(objects))


def class_names(truth: dict) -> dict[int, str]:
    """The name of each category id; with the id where several have the same."""
    names = [category["name"] for category in truth["categories"]]
    return {
        category["id"]: category["name"] + (f" ({category['id']})" if names.count(category["name"]) > 1 else "")
        for category in truth["categories"]
    }


def metrics_table(metrics: dict[str, float]) -> str:
    """The 12 numbers and the AP of each class, for a terminal."""
    lines = [
        "".join(f"{name:>11}" for name in METRICS[start : start + 6])
        + "\n"
        + "".join(f"{metrics[name]:>11.3f}" for name in METRICS[start : start + 6])
        for start in (0, 6)
    ]
    per_class = {key.removeprefix("per_class/"): v for key, v in metrics.items() if key.startswith("per_class/")}
    width = max(len(shown(name)) for name in per_class)
    rows = (f"  {shown(name):<{width}} {v:>7.3f}" for name, v in per_class.items())
    lines.append("\n".join(["AP by class", *rows]))
    return "\n".join(lines)
