"""Inference with a trained model in Python."""

from pix2seq.inference.predictor import DetectionResult, Pix2Seq

__all__ = ["DetectionResult", "Pix2Seq"]
