"""Evaluation during training: COCO metrics, and predictions for the same few images over time."""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.color_augmentation import apply_color_ops
from pix2seq.data import Annotations, EvalDataset
from pix2seq.evaluation import predict, prediction_image, warn_unreadable
from pix2seq.evaluation.coco_metrics import coco_metrics
from pix2seq.generation import DecodingOptions
from pix2seq.tokenizer import Tokenizer
from pix2seq.training.hard_negatives import select_hard_negatives
from pix2seq.training.preemption import StopRequest
from pix2seq.training.run_folder import RunFolder
from pix2seq.visualization import draw_examples

NUM_SAMPLES = 8  # images in a grid


@dataclass
class TrainingEvaluator:
    """Evaluates models on the validation images. All ranks call its methods; the main one writes the results.

    The methods raise `Stopped` when any rank was asked to stop.

    Attributes:
        folder: run folder.
        accelerator: Accelerate's Accelerator.
        val_set: validation images.
        ground_truth: annotations of `val_set`, see `load_ground_truth`.
        options: decoding options.
        batch_size: images per process.
        num_workers: data loading workers.
        stop: request to stop.
    """

    folder: RunFolder
    accelerator: Accelerator
    val_set: EvalDataset[Annotations]
    ground_truth: dict
    options: DecodingOptions
    batch_size: int
    num_workers: int
    stop: StopRequest

    def evaluate(self, model, step: int, name: str = "") -> dict[str, float] | None:
        """Computes COCO metrics.

        Args:
            model: a Pix2SeqForObjectDetection.
            step: optimizer steps taken.
            name: name of the model if it is not the trained one, see `RunFolder.evaluation`.

        Returns:
            The metrics on the main process, None on others.
        """
        predictions = self._predict(model, self.val_set)
        if not self.accelerator.is_main_process:
            return None
        metrics = coco_metrics(self.ground_truth, predictions)
        images = {"predictions": prediction_image(self.val_set.annotations, predictions, NUM_SAMPLES)}
        self.folder.evaluation(step, metrics, predictions, images, name)
        return metrics

    def sample(self, model, step: int) -> None:
        """Draws ground truth and predictions of the first images."""
        annotations = self.val_set.annotations
        first = annotations.subset(range(min(NUM_SAMPLES, len(annotations))))
        predictions = self._predict(model, EvalDataset(first, self.val_set.transform))
        if self.accelerator.is_main_process:
            self.folder.sample("predictions", step, prediction_image(first, predictions, NUM_SAMPLES))

    def find_hard_negatives(self, model, images: Annotations) -> dict[int, torch.Tensor]:
        """Detects objects in training images and returns the false detections, see `select_hard_negatives`."""
        dataset = EvalDataset(images, self.val_set.transform)
        predictions = predict(
            model,
            dataset,
            replace(self.options, num_samples=1),  # faster
            self.batch_size,
            self.accelerator,
            self.num_workers,
            stop=lambda: bool(self.stop),
            warn=lambda lines: None,  # an unreadable image has no detections; training replaces and counts it
            description="searching hard negatives",
        )
        return select_hard_negatives(predictions, images)

    def log_first_batch(self, batch: dict, tokenizer: Tokenizer) -> None:
        """Draws the first training batch with the boxes decoded from its labels, which shows most data errors."""
        decoded = [tokenizer.decode(labels.numpy()) for labels in batch["labels"][:NUM_SAMPLES]]
        pixel_values = batch["pixel_values"]
        if "color_ops" in batch:
            pixel_values = apply_color_ops(pixel_values, batch["size"], batch["color_ops"])
        images = [to_pil_image(pixels) for pixels in pixel_values[:NUM_SAMPLES]]
        class_names = self.val_set.annotations.categories.names
        self.folder.sample("first_batch", 0, draw_examples(images, decoded, class_names))

    def _predict(self, model, dataset: EvalDataset[Annotations]) -> list[dict]:
        return predict(
            model,
            dataset,
            self.options,
            self.batch_size,
            self.accelerator,
            self.num_workers,
            stop=lambda: bool(self.stop),
            warn=lambda lines: warn_unreadable(lines, self.folder.log),
        )
