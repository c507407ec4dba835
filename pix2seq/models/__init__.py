"""Pix2Seq models in the structure of Hugging Face models: config, model, image processor."""

from pix2seq.models.build import build_model
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.detections import Detections
from pix2seq.models.fine_tuning import adapt_to_classes
from pix2seq.models.load import load_model
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection, Pix2SeqOutput

__all__ = [
    "Detections",
    "Pix2SeqConfig",
    "Pix2SeqForObjectDetection",
    "Pix2SeqOutput",
    "adapt_to_classes",
    "build_model",
    "load_model",
]
