"""From a model or a predictions file to COCO numbers. The numbers are pycocotools'.

Every image is evaluated once, against the original annotation file: crowds included, nothing rounded or truncated.
"""

import contextlib
import io

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from pix2seq.coco import Annotations, check_predictions
from pix2seq.data import EvalDataset, eval_loader, load_image
from pix2seq.decoding import DecodingOptions, Detections, generate
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import to_original_pixels
from pix2seq.visualize import CELL, color_of, draw_boxes, enlarge, side_by_side

METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
RESULT_KEYS = ("image_id", "category_id", "bbox", "score")  # pycocotools takes others for another task
METRICS += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


def predict(model, dataset: EvalDataset, options: DecodingOptions, batch_size: int, accelerator, num_workers: int = 0):
    """COCO results of every image of the dataset, gathered from all ranks in the dataset's order.

    The model is put in eval mode and back. Every rank calls this, and every rank gets the whole list.
    """
    tokenizer = Tokenizer(len(model.config.category_ids), model.config.num_bins)
    loader = eval_loader(dataset, batch_size, accelerator.process_index, accelerator.num_processes, num_workers)
    was_training = model.training
    model.eval()
    results = []
    for batch in tqdm(loader, desc="evaluating", disable=None if accelerator.is_main_process else True, leave=False):
        image_ids = batch["image_id"].tolist()
        with accelerator.autocast():
            found = generate(model, batch["pixel_values"].to(accelerator.device), tokenizer, options, image_ids)
        for row, detections in enumerate(found):
            size, original_size = batch["size"][row].tolist(), batch["original_size"][row].tolist()
            side = dataset.transform.image_size
            detections.boxes = to_original_pixels(detections.boxes, side, size, original_size)
            results.append((image_ids[row], coco_results(image_ids[row], detections, model.config.category_ids)))
    model.train(was_training)

    # Batches are dealt out so that no image is read twice; keying by image id is the second guard.
    by_image = {}
    for image_id, rows in accelerator.gather_for_metrics(results, use_gather_object=True):
        by_image.setdefault(image_id, rows)
    return [row for image_id in dataset.annotations.image_ids.tolist() for row in by_image[image_id]]


def coco_results(image_id: int, detections: Detections, category_ids: list[int]) -> list[dict]:
    """Detections in original pixels -> entries of a COCO results file, best score first."""
    rows = []
    for index in np.argsort(-detections.scores, kind="stable"):
        x1, y1, x2, y2 = detections.boxes[index].tolist()
        rows.append(
            {
                "image_id": image_id,
                "category_id": category_ids[detections.labels[index]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(detections.scores[index]),
            }
        )
    return rows


def oracle_predictions(dataset: EvalDataset, tokenizer: Tokenizer) -> list[dict]:
    """The ground truth through the tokenizer and back, as COCO results: what a perfect model would score."""
    annotations, transform = dataset.annotations, dataset.transform
    results = []
    for index in tqdm(range(len(dataset)), desc="oracle", disable=None, leave=False):
        image_id, path = int(annotations.image_ids[index]), annotations.path(index)
        boxes, labels = annotations.objects(index)
        image = load_image(path)
        canvas = transform(image, boxes)
        boxes, labels = tokenizer.decode(tokenizer.encode(canvas.boxes, labels[canvas.kept]))
        boxes = to_original_pixels(boxes, transform.image_size, canvas.size, tuple(image.shape[-2:]))
        detections = Detections(boxes, labels, np.ones(len(boxes)))
        results += coco_results(image_id, detections, annotations.categories.ids)
    return results


def coco_metrics(truth: dict, predictions: list[dict]) -> dict[str, float]:
    """The 12 COCO numbers by the names in METRICS, and `per_class/<name>`: AP of each class.

    As in pycocotools, -1 where there is nothing to find (no large objects, say). Raises DataError.
    """
    check_predictions(predictions, truth)
    class_names = {category["id"]: category["name"] for category in truth["categories"]}
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = truth
        ground_truth.createIndex()
        rows = [{key: row[key] for key in RESULT_KEYS} for row in predictions]
        # pycocotools cannot load an empty list, but it can evaluate one.
        found = ground_truth.loadRes(rows) if rows else COCO()
        evaluation = COCOeval(ground_truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    precision = evaluation.eval["precision"]  # (IoU thresholds, recalls, classes, areas, max detections)
    for index, category_id in enumerate(evaluation.params.catIds):
        values = precision[:, :, index, 0, -1]
        values = values[values > -1]
        metrics[f"per_class/{class_names[category_id]}"] = float(values.mean()) if values.size else -1.0
    return metrics


def metrics_table(metrics: dict[str, float]) -> str:
    """The 12 numbers and the AP of each class, for a terminal."""
    lines = [
        "".join(f"{name:>11}" for name in METRICS[start : start + 6])
        + "\n"
        + "".join(f"{metrics[name]:>11.3f}" for name in METRICS[start : start + 6])
        for start in (0, 6)
    ]
    per_class = {key.removeprefix("per_class/"): v for key, v in metrics.items() if key.startswith("per_class/")}
    width = max(map(len, per_class))
    lines.append("\n".join(["AP by class", *(f"  {name:<{width}} {v:>7.3f}" for name, v in per_class.items())]))
    return "\n".join(lines)


def prediction_picture(annotations: Annotations, predictions: list[dict], count: int, min_score: float = 0.3):
    """The first `count` images with ground truth on the left and predictions of at least `min_score` on the right."""
    names = annotations.categories.names
    label_of_category = {category_id: label for label, category_id in enumerate(annotations.categories.ids)}
    pairs = []
    for index in range(min(count, len(annotations))):
        image = Image.open(annotations.path(index)).convert("RGB")
        boxes, labels = annotations.objects(index)
        large, boxes = enlarge(image, boxes, CELL)
        truth = draw_boxes(large, boxes, [names[label] for label in labels], [color_of(label) for label in labels])
        shown = [p for p in predictions if p["image_id"] == annotations.image_ids[index] and p["score"] >= min_score]
        boxes = np.array([p["bbox"] for p in shown]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [label_of_category[p["category_id"]] for p in shown]
        captions = [f"{names[label]} {p['score']:.2f}" for label, p in zip(labels, shown, strict=True)]
        large, boxes = enlarge(image, boxes, CELL)
        pairs.append((truth, draw_boxes(large, boxes, captions, [color_of(label) for label in labels])))
    return side_by_side(pairs)
