"""Inference with a trained model."""

from pix2seq.inference.detector import Pix2Seq
from pix2seq.inference.images import ImageSource
from pix2seq.inference.results import DetectionResult

__all__ = ["DetectionResult", "ImageSource", "Pix2Seq"]
