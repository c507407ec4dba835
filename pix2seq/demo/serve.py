"""Serves the demo page: `python -m pix2seq demo --checkpoint OUT/best`. Needs gradio, and no network."""

import os
import signal
import socket
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torchvision.transforms.v2.functional import to_pil_image
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, read_training_arguments, run_command
from pix2seq.arguments import DecodingArguments, argument, check_at_least, check_value
from pix2seq.data import find_split, load_annotations
from pix2seq.data.shapes import draw_image
from pix2seq.demo.page import build_page, launch
from pix2seq.demo.worker import InferenceWorker
from pix2seq.errors import UserError
from pix2seq.inference import Pix2Seq
from pix2seq.models import load_model

NUM_EXAMPLES = 5


@dataclass
class DemoArguments(DecodingArguments):
    """All arguments of `python -m pix2seq demo`."""

    _argument_group_name: ClassVar = "demo"

    checkpoint: str = argument(None, "folder of a trained model: OUT/best, OUT/final or a checkpoint")
    host: str = argument("127.0.0.1", "address of the server; 0.0.0.0 makes it reachable from other machines")
    port: int = argument(7860, "port of the server")
    threshold: float = argument(0.5, "initial score threshold of the boxes")
    device: str | None = argument(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    tokens_per_second: int = argument(100, "speed limit of the display, so that one can watch (0: none)")
    max_mb: int = argument(20, "largest file in megabytes")
    max_queue: int = argument(32, "largest number of waiting images; further ones are rejected")

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is None:
            raise ValueError("--checkpoint: missing; name the folder of a trained model")
        check_value(self, "threshold", 0 <= self.threshold <= 1, "0 to 1")
        check_value(self, "port", 1 <= self.port <= 65535, "1 to 65535")
        check_at_least(self, 1, "max_mb", "max_queue")
        check_at_least(self, 0, "tokens_per_second")


def save_examples(checkpoint: str, folder: Path, host: str) -> list[str]:
    """Saves example images as PNG files.

    The examples are validation images of the model if its dataset exists and the page is not reachable from other
    machines, because the images may be private. Otherwise they are drawn shapes.

    Args:
        checkpoint: Folder of the model.
        folder: Existing folder.
        host: Address of the server.

    Returns:
        The paths of the files.
    """
    try:
        if host not in ("127.0.0.1", "localhost"):
            raise ValueError("validation images are not shown to other machines")
        arguments = read_training_arguments(checkpoint, "--checkpoint")
        split = find_split("val", *(arguments.get(name) for name in ("root", "val_images", "val_json")))
        annotations = load_annotations(split)
        indices = np.unique(np.linspace(0, len(annotations) - 1, NUM_EXAMPLES, dtype=int))
        images = [to_pil_image(annotations.image_file(index).pixels()) for index in indices.tolist()]
    except (ValueError, TypeError):  # the dataset does not exist, or the model has no training.yaml
        images = [draw_image(np.random.default_rng(seed), 320, 4)[0] for seed in range(2, 2 + NUM_EXAMPLES)]
    paths = [folder / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return [str(path) for path in paths]


def run_demo(args: DemoArguments) -> int:
    """Serves the page until Ctrl-C or SIGTERM.

    Returns:
        0.

    Raises:
        UserError: An argument is not valid, or gradio is not installed.
    """
    address = f"--host {args.host} --port {args.port}"
    try:
        with socket.create_server((args.host, args.port)):
            pass
    except OSError as error:
        raise UserError(f"{address}: cannot be used ({error.strerror})") from None
    transformers_logging.disable_progress_bar()
    model = load_model(args.checkpoint, "--checkpoint")
    try:
        detector = Pix2Seq(model, args.device, **args.decoding())
    except UserError as error:
        raise UserError(f"--{error}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder is deleted
    with (
        tempfile.TemporaryDirectory(prefix="pix2seq-demo-") as folder,
        closing(InferenceWorker(detector, args.max_queue)) as worker,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        (examples := Path(folder) / "examples").mkdir()
        paths = save_examples(args.checkpoint, examples, args.host)
        page = build_page(worker, paths, args.threshold, args.tokens_per_second)
        try:
            launch(page, host=args.host, port=args.port, max_mb=args.max_mb, threshold=args.threshold)
        except OSError as error:
            raise UserError(f"{address}: cannot be used ({error})") from None
        print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return 0


def main(argv: list[str] | None = None, program: str = "pix2seq demo") -> int:
    """Parses the command line and serves the page; returns the exit code."""
    return run_command(run_demo, parse(DemoArguments, argv, program), program=program)
