"""The model, as Hugging Face models are: a config, a class, from_pretrained and save_pretrained."""

from pix2seq.models.build import build_model
from pix2seq.models.configuration_pix2seq import Pix2SeqConfig
from pix2seq.models.fine_tuning import adapt
from pix2seq.models.load import load_model
from pix2seq.models.modeling_pix2seq import Pix2SeqForObjectDetection, Pix2SeqOutput

__all__ = ["Pix2SeqConfig", "Pix2SeqForObjectDetection", "Pix2SeqOutput", "adapt", "build_model", "load_model"]
