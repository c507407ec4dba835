"""The model, as Hugging Face models are: a config, a class, from_pretrained and save_pretrained."""

from pix2seq.model.build import build_detector
from pix2seq.model.configuration import Pix2SeqConfig
from pix2seq.model.detector import Pix2SeqForObjectDetection, Pix2SeqOutput
from pix2seq.model.load import load_detector
from pix2seq.model.transfer import adapt

__all__ = ["Pix2SeqConfig", "Pix2SeqForObjectDetection", "Pix2SeqOutput", "adapt", "build_detector", "load_detector"]
