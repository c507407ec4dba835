"""From a model and a dataset to predictions, and what can be read from them: see report.py and compare.py."""

from pix2seq.evaluation.images import prediction_image, worst_image
from pix2seq.evaluation.predictions import coco_results, oracle_predictions, predict, warn_unreadable

__all__ = [
    "coco_results",
    "oracle_predictions",
    "predict",
    "prediction_image",
    "warn_unreadable",
    "worst_image",
]
