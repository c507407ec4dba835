"""From a model and a dataset to predictions, and what can be read from them: see report.py and compare.py."""

from pix2seq.evaluation.predictions import coco_results, oracle_predictions, predict, prediction_picture
from pix2seq.evaluation.worst import worst_picture

__all__ = ["coco_results", "oracle_predictions", "predict", "prediction_picture", "worst_picture"]
