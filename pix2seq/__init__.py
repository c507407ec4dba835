"""Object detection as language modelling (Pix2Seq). Importing the package registers the model with transformers."""

__version__ = "0.1.0"

from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from pix2seq.models import Pix2SeqConfig, Pix2SeqForObjectDetection
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor

__all__ = ["Pix2Seq", "Pix2SeqConfig", "Pix2SeqForObjectDetection", "Pix2SeqImageProcessor"]

AutoConfig.register("pix2seq", Pix2SeqConfig, exist_ok=True)
AutoModelForObjectDetection.register(Pix2SeqConfig, Pix2SeqForObjectDetection, exist_ok=True)
AutoImageProcessor.register(
    Pix2SeqConfig, image_processor_classes={"torchvision": Pix2SeqImageProcessor}, exist_ok=True
)
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["pix2seq"] = "Pix2SeqForObjectDetection"  # pipelines look it up here


def __getattr__(name: str):
    """Imports `Pix2Seq` lazily: its file readers and drawing functions are not needed for the transformers classes."""
    if name == "Pix2Seq":
        from pix2seq.inference import Pix2Seq

        return Pix2Seq
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
