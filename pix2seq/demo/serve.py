"""Serves the page.

    python -m pix2seq demo --checkpoint runs/demo/best

Needs gradio, and no network.
"""

import os
import signal
import socket
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, read_training_arguments, run_command
from pix2seq.arguments import DecodingArguments, argument
from pix2seq.data import find_split, load_annotations
from pix2seq.data.shapes import draw_image
from pix2seq.demo.page import build_page, launch
from pix2seq.demo.worker import LEAST_SIDE, InferenceWorker
from pix2seq.errors import UserError
from pix2seq.inference import Pix2Seq
from pix2seq.models import load_model

EXAMPLES, EXAMPLE_SIDE, EXAMPLE_SHAPES = 5, 320, 4


@dataclass
class DemoArguments(DecodingArguments):
    checkpoint: str | None = argument(None, "folder of a trained detector: OUT/best, OUT/final or a checkpoint")
    host: str = argument("127.0.0.1", "address to serve at: this machine alone can reach the default; 0.0.0.0 is all")
    port: int = argument(7860, "port to serve at")
    threshold: float = argument(0.5, "only objects of a higher score are drawn at first")
    device: str | None = argument(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    pace: int = argument(100, "tokens a second a page shows at most, so that one can watch (0: as fast as they come)")
    max_side: int = argument(8192, "pixels a side of a picture may have")
    max_mb: int = argument(20, "megabytes a file may have")
    max_queue: int = argument(32, "pictures that may wait; visitors with further ones are told to come back")

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("--checkpoint: missing (the folder of a trained detector)")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: must be 0 to 1")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: must be 1 to 65535")
        if self.max_side < LEAST_SIDE:
            raise ValueError(f"--max_side {self.max_side}: must be at least {LEAST_SIDE}")
        if self.pace < 0 or self.max_mb < 1 or self.max_queue < 1:
            raise ValueError(
                f"--pace {self.pace}, --max_mb {self.max_mb}, --max_queue {self.max_queue}: at least 0, 1 and 1"
            )
        super().__post_init__()


def find_examples(checkpoint: str, folder: Path, host: str) -> list[str]:
    """Files of pictures the detector was evaluated on, if its dataset is there and no other machine sees the page: it
    may be nobody else's business. Else of drawn shapes."""
    if host not in ("127.0.0.1", "localhost"):
        return draw_examples(folder)
    flags = read_training_arguments(checkpoint, "--checkpoint")
    try:
        where = (flags.get(name) for name in ("root", "val_images", "val_json"))
        annotations = load_annotations(find_split("val", *where))
        indices = np.linspace(0, len(annotations) - 1, EXAMPLES, dtype=int)
        pictures = [annotations.image_file(index).pixels() for index in dict.fromkeys(indices.tolist())]
    except (ValueError, TypeError):  # no such folder, or no flags at all
        return draw_examples(folder)
    return [_saved(to_pil_image(pixels), folder, number) for number, pixels in enumerate(pictures)]


def draw_examples(folder: Path) -> list[str]:
    """Files of drawn shapes, at least two in each."""
    drawn = (draw_image(np.random.default_rng(seed), EXAMPLE_SIDE, EXAMPLE_SHAPES) for seed in range(10**6))
    crowded = (image for image, objects in drawn if len(objects) > 1)
    return [_saved(image, folder, number) for number, image in zip(range(EXAMPLES), crowded, strict=False)]


def _saved(image: Image.Image, folder: Path, number: int) -> str:
    path = folder / f"{number}.png"
    image.save(path)
    return str(path)


def serve(args: DemoArguments) -> None:
    """Serves the page until it is interrupted. Raises UserError."""
    try:
        with socket.create_server((args.host, args.port)):
            pass
    except OSError as error:
        raise UserError(f"--host {args.host} --port {args.port}: cannot be served at ({error.strerror})") from None
    transformers_logging.disable_progress_bar()
    model = load_model(args.checkpoint, "--checkpoint")
    try:
        detector = Pix2Seq(model, args.device, **args.decoding())
    except UserError as error:
        raise UserError(f"--{error}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the folder goes
    with (
        tempfile.TemporaryDirectory(prefix="pix2seq-demo-") as folder,
        closing(InferenceWorker(detector, args.max_side, args.max_queue)) as desk,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        examples = Path(folder) / "examples"
        examples.mkdir()
        page = build_page(desk, find_examples(args.checkpoint, examples, args.host), args.threshold, args.pace)
        try:
            launch(page, args.host, args.port, args.max_mb, args.threshold)
        except OSError as error:
            raise UserError(f"--host {args.host} --port {args.port}: cannot be served at ({error})") from None
        print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def run_demo(args: DemoArguments) -> int:
    """Serves the page; returns the exit code."""
    serve(args)
    return 0


def main(argv: list[str] | None = None, program: str = "pix2seq demo") -> int:
    """Parses the command line and serves the page; returns the exit code."""
    return run_command(run_demo, parse(DemoArguments, argv, program), program=program)
