"""Evaluation: predictions of a model over a dataset, COCO metrics, images, a report, and the comparison of models."""

from pix2seq.evaluation.images import prediction_image
from pix2seq.evaluation.predictions import coco_results, oracle_predictions, predict, warn_unreadable

__all__ = [
    "coco_results",
    "oracle_predictions",
    "predict",
    "prediction_image",
    "warn_unreadable",
]
