"""What a run shows of its detectors while it trains: COCO numbers, and pictures of the same few images over time."""

from dataclasses import dataclass

import numpy as np
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.colors import apply_color_ops
from pix2seq.data import Annotations, EvalDataset
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation import predict, prediction_image, warn_unreadable, worst_image
from pix2seq.evaluation.coco_metrics import coco_metrics
from pix2seq.generation import DecodingOptions
from pix2seq.tokenizer import Tokenizer
from pix2seq.training.preemption import StopRequest
from pix2seq.training.run_folder import RunFolder
from pix2seq.training.trackers import Example
from pix2seq.visualization import draw_examples, enlarge

NUM_SAMPLES = 8  # images in every picture
ENOUGH_OBJECTS = 3  # the strip is of the first image that has them, or of one that has most
SIDE = 640  # of those whose boxes a tracker draws


@dataclass
class TrainingEvaluator:
    """Every rank calls its methods, the main one writes into the run folder. They raise Stopped when any
    rank has been told to `stop`.

    truth   the ground truth of `val_set`: see load_ground_truth
    """

    folder: RunFolder
    accelerator: object
    val_set: EvalDataset
    truth: dict
    options: DecodingOptions
    batch_size: int
    num_workers: int
    stop: StopRequest

    def evaluate(self, detector, step: int, name: str = "") -> dict[str, float] | None:
        """COCO numbers of the validation images; None on other ranks than the main one. `name`: see RunFolder."""
        predictions = self._predict(detector, self.val_set)
        if not self.accelerator.is_main_process:
            return None
        metrics = coco_metrics(self.truth, predictions)
        pictures = {
            "predictions": prediction_image(self.val_set.annotations, predictions, NUM_SAMPLES),
            "worst": worst_image(self.val_set.annotations, predictions, NUM_SAMPLES),
        }
        self.folder.evaluation(step, metrics, predictions, pictures, name, *self._for_trackers(predictions))
        return metrics

    def sample(self, detector, step: int) -> None:
        """Ground truth beside predictions, always of the same images, and one of them over the steps."""
        annotations = self.val_set.annotations
        some = annotations.subset(range(min(NUM_SAMPLES, len(annotations))))
        predictions = self._predict(detector, EvalDataset(some, self.val_set.transform))
        if self.accelerator.is_main_process:
            picture = prediction_image(some, predictions, NUM_SAMPLES)
            self.folder.sample("predictions", step, picture, *self._for_trackers(predictions))
            counts = [len(some.objects(index)[1]) for index in range(len(some))]
            self.folder.strip(step, int(np.argmax(np.minimum(counts, ENOUGH_OBJECTS))))

    def log_first_batch(self, batch: dict, tokenizer: Tokenizer) -> None:
        """What the model is about to learn, decoded back from its tokens: the cheapest detector of data bugs."""
        decoded = [tokenizer.decode(labels.numpy()) for labels in batch["labels"][:NUM_SAMPLES]]
        pixel_values = batch["pixel_values"]
        if "color_ops" in batch:
            pixel_values = apply_color_ops(pixel_values, batch["size"], batch["color_ops"])
        images = [to_pil_image(pixels) for pixels in pixel_values[:NUM_SAMPLES]]
        names = self.val_set.annotations.categories.names
        self.folder.sample("first_batch", 0, draw_examples(images, decoded, names))

    def _for_trackers(self, predictions: list[dict]) -> tuple[list[Example], tuple[str, ...]]:
        """The first images with their objects and the predictions, and the classes' names; nothing if none asks."""
        annotations = self.val_set.annotations
        names = annotations.categories.names
        return (examples(annotations, predictions, NUM_SAMPLES) if self.folder.trackers else []), names

    def _predict(self, detector, dataset: EvalDataset) -> list[dict]:
        return predict(
            *(detector, dataset, self.options, self.batch_size, self.accelerator, self.num_workers),
            stop=lambda: bool(self.stop),
            warn=lambda lines: warn_unreadable(lines, self.folder.log),
        )


def examples(annotations: Annotations, predictions: list[dict], count: int) -> list[Example]:
    """The first `count` images with their objects and the predictions for them, without those that cannot be read."""
    label_of_category = {category_id: label for label, category_id in enumerate(annotations.categories.ids)}
    found = []
    for index in range(min(count, len(annotations))):
        try:
            image = to_pil_image(annotations.image_file(index).pixels())
        except BadImageError:
            continue
        boxes, labels = annotations.objects(index)
        mine = [row for row in predictions if row["image_id"] == annotations.image_ids[index]]
        found_boxes = np.array([row["bbox"] for row in mine]).reshape(-1, 4)
        found_boxes[:, 2:] += found_boxes[:, :2]
        found_labels = np.array([label_of_category[row["category_id"]] for row in mine], dtype=np.int64)
        scores = np.array([row["score"] for row in mine])
        found_boxes = enlarge(image, found_boxes, SIDE)[1]
        found.append(Example(*enlarge(image, boxes, SIDE), labels, found_boxes, found_labels, scores))
    return found
