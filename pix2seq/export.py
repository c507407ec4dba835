"""Exports a model to ONNX and checks that the exported model detects the same objects.

    python export.py --checkpoint OUT/best --output_dir ONNX

Writes encoder.onnx, decoder_step.onnx, config.json, preprocessor_config.json and a README.md. See docs/export.md.
"""

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, run_command
from pix2seq.arguments import argument, check_value
from pix2seq.data.shapes import draw_image
from pix2seq.errors import UserError
from pix2seq.generation import NonFiniteLogits, generate_tokens
from pix2seq.inference import onnx_graphs
from pix2seq.inference.onnx import OnnxDetector
from pix2seq.manifest import write_folder_atomically
from pix2seq.models import Pix2SeqForObjectDetection, load_model
from pix2seq.models.detections import Detections, to_detections
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor
from pix2seq.progress import progress
from pix2seq.transforms import PAD_VALUE

OPSETS = range(18, 26)  # written by torch and read by onnxruntime
NUM_IMAGES, BATCH_SIZE = 20, 5  # of the parity check
MIN_EQUAL = 0.9  # fraction of images with the same objects
MAX_LOGIT_DIFFERENCE = 1e-3  # relative to the largest logit
BOX_TOLERANCE, SCORE_TOLERANCE = 1e-4, 1e-3  # BOX_TOLERANCE is a fraction of the image side, much less than a bin

README = f"""\
An object detection model, exported to ONNX by pix2seq.

{onnx_graphs.DESCRIPTION}
`pixel_values` is uint8 and contains the image in the top left corner of a square that is filled with {PAD_VALUE}.
`config.json` contains the class names (`id2label`) and `num_bins`. With pix2seq installed:

    from pix2seq.inference.onnx import OnnxDetector
    detections = OnnxDetector("this folder").detect(pixel_values)

docs/export.md of pix2seq contains a decoder in NumPy.
"""


@dataclass
class ExportArguments:
    """All arguments of `export.py`."""

    _argument_group_name: ClassVar = "export"

    checkpoint: str = argument(None, "folder of a trained model: OUT/best or OUT/final")
    output_dir: str = argument(None, "folder of the exported model; must not exist")
    opset: int = argument(20, f"version of the ONNX operators: {OPSETS[0]} to {OPSETS[-1]}")

    def __post_init__(self):
        for name in ("checkpoint", "output_dir"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name}: missing")
        check_value(self, "opset", self.opset in OPSETS, f"{OPSETS[0]} to {OPSETS[-1]}")


class PairedModels:
    """Decodes with a model and gives the same tokens to its exported version.

    Attributes:
        max_difference: The largest difference between their logits, relative to the largest logit.
    """

    def __init__(self, model: Pix2SeqForObjectDetection, exported: OnnxDetector):
        self.model, self.exported, self.config, self.max_difference = model, exported, model.config, 0.0

    def prefill(self, pixel_values: torch.Tensor, max_length: int) -> "PairedModels":
        self.states = (
            self.model.prefill(pixel_values, max_length),
            self.exported.prefill(pixel_values, max_length),
        )
        return self

    def decode_step(
        self, token_ids: torch.Tensor, position: int, incremental_decoder: "PairedModels", vocab_slice: slice
    ) -> torch.Tensor:
        logits = self.model.decode_step(token_ids, position, self.states[0], vocab_slice)
        exported_logits = self.exported.decode_step(token_ids, position, self.states[1], vocab_slice)
        difference = ((logits - exported_logits).abs().max() / logits.abs().max().clamp(min=1)).item()
        self.max_difference = max(self.max_difference, difference if math.isfinite(difference) else math.inf)
        return logits

    def select_batch(self, rows: torch.Tensor) -> None:
        for state in self.states:
            state.select_batch(rows)


def check_parity(model: Pix2SeqForObjectDetection, folder: Path) -> str:
    """Compares a model with its exported version on drawn images.

    A tenth of the images may have other objects: where two tokens are almost equally probable, rounding decides, and
    the sequences differ from there on.

    Args:
        model: The model.
        folder: The exported model.

    Returns:
        A sentence that states the differences.

    Raises:
        UserError: The differences are too large.
    """
    exported = OnnxDetector(folder)
    options = replace(model.decoding_options, num_samples=1)  # rounding could change the order of merged objects
    images = [draw_image(np.random.default_rng(seed), 64, 6)[0] for seed in range(NUM_IMAGES)]
    pixel_values = Pix2SeqImageProcessor.from_model_config(model.config)(images)["pixel_values"]
    pair, num_equal = PairedModels(model, exported), 0
    for batch in progress(pixel_values.split(BATCH_SIZE), "comparing"):
        state = generate_tokens(pair, batch, model.tokenizer, options)
        expected = to_detections(state, model.tokenizer, options)
        num_equal += sum(map(_are_equal, expected, exported.detect(batch, options)))
    summary = (
        f"The largest difference of logits is {pair.max_difference:.1e} of the largest logit; "
        f"the objects of {num_equal} of {NUM_IMAGES} images are the same."
    )
    if pair.max_difference > MAX_LOGIT_DIFFERENCE or num_equal < MIN_EQUAL * NUM_IMAGES:
        raise UserError(f"the exported model differs from the model and was deleted. {summary}")
    return summary


def _are_equal(expected: Detections, actual: Detections) -> bool:
    return (
        np.array_equal(expected.labels, actual.labels)
        and np.allclose(expected.boxes, actual.boxes, rtol=0, atol=BOX_TOLERANCE)
        and np.allclose(expected.scores, actual.scores, rtol=0, atol=SCORE_TOLERANCE)
    )


def run_export(args: ExportArguments) -> int:
    """Exports a model.

    Returns:
        0.

    Raises:
        UserError: A package is missing, an argument is not valid, or the exported model differs from the model.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"the export needs {', '.join(missing)}: pip install {' '.join(missing)}")
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output_dir {output}: exists; name a new folder")
    transformers_logging.disable_progress_bar()
    model = load_model(args.checkpoint, "--checkpoint").float().eval().requires_grad_(False)

    def write(folder: Path) -> None:
        model.config.save_pretrained(folder)
        Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(folder)
        onnx_graphs.export_graphs(model, folder, args.opset)
        parity = check_parity(model, folder)
        print(parity)
        (folder / "README.md").write_text(f"{README}\n{parity}\n")

    try:
        write_folder_atomically(output, write)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written to ({error.strerror or error})") from None
    except NonFiniteLogits as error:
        raise UserError(f"--checkpoint {args.checkpoint}: {error}") from None
    print(f"written to {output}")
    return 0


def main(argv: list[str] | None = None, program: str = "export.py") -> int:
    """Parses the command line and exports; returns the exit code."""
    return run_command(run_export, parse(ExportArguments, argv, program), program=program)
