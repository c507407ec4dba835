"""From a model and a dataset to predictions, and what can be read from them: see report.py and compare.py."""

from pix2seq.evaluation.pictures import prediction_picture, worst_picture
from pix2seq.evaluation.predictions import coco_results, oracle_predictions, predict, warn_of_unreadable

__all__ = [
    "coco_results",
    "oracle_predictions",
    "predict",
    "prediction_picture",
    "warn_of_unreadable",
    "worst_picture",
]
