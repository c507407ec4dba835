"""COCO metrics, equal to those of pycocotools. hotcoco computes them many times faster."""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import hotcoco
import numpy as np

from pix2seq.data.coco import Categories, read_coco, read_json
from pix2seq.data.issues import DatasetIssue, is_finite, is_id, sanitize, usable_images, usable_objects
from pix2seq.errors import UserError

AP_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
AR_METRICS = ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
METRICS = AP_METRICS + AR_METRICS
# hotcoco rejects some values of other keys, such as "width": null. The metrics do not depend on them.
GROUND_TRUTH_KEYS = {
    "images": ("id",),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
PREDICTION_KEYS = ("image_id", "category_id", "bbox", "score")


def load_ground_truth(
    path: str | Path,
    image_ids: np.ndarray | None = None,
    categories: Categories | None = None,
    warn: Callable[[list[DatasetIssue]], None] | None = None,
) -> dict:
    """Reads a COCO annotation file and repairs what pycocotools would silently misread.

    Annotations are renumbered from 1 (pycocotools ignores matches with id 0), missing `area` and `iscrowd` are filled
    in, and the entries that training leaves out are left out.

    Args:
        path: The annotation file.
        image_ids: Keep only these images and their annotations. Default: all.
        categories: Classes of the model, which may be more than those in the file. Default: those in the file.
        warn: Called with the issues in the file, if there are any.

    Raises:
        UserError: The file cannot be read or is not a COCO annotation file.
    """
    ground_truth = read_coco(Path(path))
    ground_truth["images"], image_issues = usable_images(ground_truth["images"], Path(path))
    known = categories.ids if categories is not None else [category["id"] for category in ground_truth["categories"]]
    ground_truth["annotations"], object_issues = usable_objects(
        ground_truth["annotations"], (image["id"] for image in ground_truth["images"]), known, Path(path)
    )
    if (image_issues or object_issues) and warn is not None:
        warn(image_issues + object_issues)
    if image_ids is not None:
        wanted = set(image_ids.tolist())
        ground_truth["images"] = [image for image in ground_truth["images"] if image["id"] in wanted]
        ground_truth["annotations"] = [
            annotation for annotation in ground_truth["annotations"] if annotation["image_id"] in wanted
        ]
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        annotation["id"] = number
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
        if not is_finite(annotation.get("area")):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    if categories is not None:
        ground_truth["categories"] = [
            {"id": category_id, "name": name}
            for category_id, name in zip(categories.ids, categories.names, strict=True)
        ]
    return ground_truth


def load_predictions(path: str | Path) -> list[dict]:
    """Reads a COCO results file without checking its entries, see `check_predictions`."""
    return read_json(Path(path), name=f"--predictions {path}")


def check_predictions(predictions: list[dict], ground_truth: dict, name: str = "predictions") -> None:
    """Checks predictions for entries on which pycocotools fails or computes wrong numbers.

    Args:
        predictions: Entries of a COCO results file.
        ground_truth: COCO annotations.
        name: Name of the predictions in error messages.

    Raises:
        UserError: Some entries are invalid. The message counts them by reason.
    """
    if not isinstance(predictions, list):
        raise UserError(f"{name}: a COCO results file is a list of objects")
    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    invalid: dict[str, list[int]] = {}
    for index, prediction in enumerate(predictions):
        if reason := _invalid_reason(prediction, image_ids, category_ids):
            invalid.setdefault(reason, []).append(index)
    if invalid:
        counts = (
            f"{len(indices)} of {len(predictions)} {reason}, first entry {indices[0]}"
            for reason, indices in invalid.items()
        )
        raise UserError(f"{name}: {'; '.join(counts)}")


def _invalid_reason(prediction, image_ids: set, category_ids: set) -> str | None:
    if not isinstance(prediction, dict) or not set(PREDICTION_KEYS) <= prediction.keys():
        return "lack image_id, category_id, bbox or score"
    if not is_id(prediction["image_id"]) or prediction["image_id"] not in image_ids:
        return f"name an image that is not in the ground truth ({prediction['image_id']!r})"
    if not is_id(prediction["category_id"]) or prediction["category_id"] not in category_ids:
        return f"name a category that is not in the ground truth ({prediction['category_id']!r})"
    box = prediction["bbox"]
    numbers = [*box, prediction["score"]] if isinstance(box, list) and len(box) == 4 else [None]
    if not all(is_finite(number) for number in numbers):
        return "have a box or score that is not made of finite numbers"
    return None


def coco_metrics(ground_truth: dict, predictions: list[dict], name: str = "predictions") -> dict[str, float]:
    """Computes the 12 COCO metrics and the AP of each class, which equal those of pycocotools.

    Args:
        ground_truth: COCO annotations from `load_ground_truth`.
        predictions: Entries of a COCO results file.
        name: Name of the predictions in error messages.

    Returns:
        The metrics by the names in `METRICS`, and `per_class/<name>`. As in pycocotools, a metric without any object
        (AP_large without large objects) is -1.

    Raises:
        UserError: Some predictions are invalid.
    """
    check_predictions(predictions, ground_truth, name)
    evaluation = evaluate_with_hotcoco(*remap_ids(ground_truth, predictions))
    metrics = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    assert evaluation.eval is not None
    precision = evaluation.eval["precision"]  # (IoU thresholds, recalls, classes, areas, max detections)
    for label, (_, class_name) in enumerate(sorted(class_names(ground_truth).items())):
        values = precision[:, :, label, 0, -1]
        values = values[values > -1]
        metrics[f"per_class/{class_name}"] = float(values.mean()) if values.size else -1.0
    return metrics


def evaluate_with_hotcoco(
    ground_truth: dict, predictions: list[dict], names: Sequence[str] | None = None
) -> hotcoco.COCOeval:
    """Runs hotcoco's COCOeval.

    Args:
        ground_truth: COCO annotations from `remap_ids`: hotcoco does not accept negative ids.
        predictions: Predictions from `remap_ids`: hotcoco infers the task from other keys.
        names: Class names for hotcoco's figures. Default: the ids, because hotcoco warns about empty names.
    """
    ground_truth = {
        key: [{k: entry[k] for k in keys} for entry in ground_truth[key]] for key, keys in GROUND_TRUTH_KEYS.items()
    }
    names = names or [str(category["id"]) for category in ground_truth["categories"]]
    ground_truth["categories"] = [
        {"id": category["id"], "name": name} for category, name in zip(ground_truth["categories"], names, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = hotcoco.COCO(ground_truth)
        results = coco.load_res(predictions) if predictions else hotcoco.COCO(ground_truth | {"annotations": []})
        evaluation = hotcoco.COCOeval(coco, results, "bbox")
        evaluation.run()
    return evaluation


def remap_ids(ground_truth: dict, predictions: list[dict]) -> tuple[dict, list[dict]]:
    """Returns copies in which image, category and annotation ids count from 1, in the order of the original ids.

    No metric changes. An id minus 1 is then an index, and hotcoco accepts data with negative ids.
    """
    images = sorted(ground_truth["images"], key=lambda image: image["id"])
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    new_image_id = {image["id"]: number for number, image in enumerate(images, start=1)}
    new_category_id = {category["id"]: number for number, category in enumerate(categories, start=1)}

    def new_ids(entry: dict) -> dict:
        return {
            "image_id": new_image_id[entry["image_id"]],
            "category_id": new_category_id[entry["category_id"]],
        }

    return {
        "images": [image | {"id": number} for number, image in enumerate(images, start=1)],
        "categories": [category | {"id": number} for number, category in enumerate(categories, start=1)],
        "annotations": [
            annotation | new_ids(annotation) | {"id": number}
            for number, annotation in enumerate(ground_truth["annotations"], start=1)
        ],
    }, [{"bbox": entry["bbox"], "score": entry["score"]} | new_ids(entry) for entry in predictions]


def box_ious(predicted: Sequence | np.ndarray, target: Sequence | np.ndarray) -> np.ndarray:
    """Computes the IoU (M, N) of xywh boxes as COCO does."""
    if not len(predicted) or not len(target):
        return np.zeros((len(predicted), len(target)))
    return hotcoco.primitives.bbox_iou(np.array(predicted, float), np.array(target, float), [False] * len(target))


def class_names(ground_truth: dict) -> dict[int, str]:
    """Returns the name of each category id, followed by the id where several categories have the same name."""
    counts = Counter(category["name"] for category in ground_truth["categories"])
    return {
        category["id"]: category["name"] + (f" ({category['id']})" if counts[category["name"]] > 1 else "")
        for category in ground_truth["categories"]
    }


def metrics_table(metrics: dict[str, float]) -> str:
    """Formats the result of `coco_metrics` for a terminal."""
    lines = []
    for names in (AP_METRICS, AR_METRICS):
        lines.append("".join(f"{name:>11}" for name in names))
        lines.append("".join(f"{metrics[name]:>11.3f}" for name in names))
    per_class = {
        sanitize(key.removeprefix("per_class/")): value
        for key, value in metrics.items()
        if key.startswith("per_class/")
    }
    width = max(map(len, per_class))
    return "\n".join(
        [*lines, "AP by class", *(f"  {name:<{width}} {value:>7.3f}" for name, value in per_class.items())]
    )
