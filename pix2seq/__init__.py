"""Object detection as language modelling. Importing the package makes its detectors known to transformers."""

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
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES["pix2seq"] = "Pix2SeqForObjectDetection"  # what pipelines go by


def __getattr__(name: str):
    """Pix2Seq comes with what reads files and draws, which transformers' routes do without."""
    if name == "Pix2Seq":
        from pix2seq.inference import Pix2Seq

        return Pix2Seq
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
