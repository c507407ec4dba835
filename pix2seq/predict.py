"""Detects objects in images and videos.

    python predict.py image.jpg folder/ "more/*.png" --checkpoint OUT/best --output_dir P
    python predict.py clip.mp4 0 --checkpoint OUT/best --output_dir P      a video file and a webcam

Writes P/predictions.json and the images with their boxes, P/NAME.jpg. Exit codes: 0 if everything was read, 2 for an
invalid argument or if an input cannot be read (all others are processed), 130 after Ctrl-C and 143 after SIGTERM (the
results so far are written).
"""

import contextlib
import itertools
import json
import math
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, run_command
from pix2seq.arguments import DecodingArguments, argument, check_at_least, check_value
from pix2seq.cpu_memory import reuse_freed_memory
from pix2seq.data.image_files import BadImageError
from pix2seq.data.issues import sanitize
from pix2seq.errors import UserError
from pix2seq.inference import Pix2Seq
from pix2seq.inference.detector import Precision
from pix2seq.inference.inputs import find_inputs, is_video, is_webcam, unique_names
from pix2seq.inference.result_files import (
    FORMATS,
    coco_entries,
    prepare_output_dir,
    write_results,
    write_yolo_labels,
)
from pix2seq.inference.video import VideoReader, import_opencv, open_video_writer
from pix2seq.models import load_model
from pix2seq.progress import progress

MAX_JPEG_SIDE = 65500  # pixels


@dataclass
class PredictArguments(DecodingArguments):
    """All arguments of `predict.py`."""

    POSITIONAL: ClassVar = "inputs"
    _argument_group_name: ClassVar = "prediction"

    inputs: list[str] = argument(
        [], "images, folders, glob patterns, video files, or the number of a webcam; also without this flag"
    )
    checkpoint: str = argument(None, "folder of a trained model: OUT/best, OUT/final or a checkpoint")
    output_dir: str = argument("predictions", "folder of the results")
    format: list[str] = argument(["coco"], "formats of the results: coco, yolo, csv, or several of them")
    save_images: bool = argument(True, "write the images and videos with their boxes")
    threshold: float = argument(0.5, "only objects with a higher score")
    classes: list[str] = argument([], "only objects of these classes, by name")
    batch_size: int = argument(8, "images per forward pass")
    num_workers: int = argument(2, "processes that read images")
    device: str | None = argument(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    dtype: Precision = argument("float32", "precision of the computation")
    overwrite: bool = argument(False, "replace files of the same name in --output_dir")

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is None:
            raise ValueError("--checkpoint: missing; name the folder of a trained model")
        for name in self.format:
            if name not in FORMATS:
                raise ValueError(f"--format {name}: must be {', '.join(FORMATS)}, or several of them")
        check_value(self, "threshold", 0 <= self.threshold <= 1, "0 to 1")
        check_at_least(self, 1, "batch_size")
        check_at_least(self, 0, "num_workers")


def output_files(args: PredictArguments, images: list[str], videos: list[str], names: dict[str, str]) -> list[str]:
    """The names of all files that may be written to the output folder."""
    files = [file for name in args.format for file in FORMATS[name]] if images else []
    files += [f"{names[path]}.jsonl" for path in videos]
    if "yolo" in args.format:
        files += [f"labels/{names[path]}.txt" for path in images]
    if args.save_images:
        files += [f"{names[path]}.jpg" for path in images] + [f"{names[path]}.mp4" for path in videos]
    return files


def predict_images(args: PredictArguments, detector: Pix2Seq, images: list[str], names: dict[str, str]) -> int:
    """Writes the results of the images, also if an exception ends the loop. Returns how many cannot be read."""
    output_dir, results, num_errors = Path(args.output_dir), [], 0
    stream = detector.stream(images, args.threshold, args.classes, args.batch_size, args.num_workers)
    try:
        for result in progress(stream, "predicting", len(images)):
            _exit_if_terminated()
            results.append(result)
            if result.error:
                num_errors += 1
                _print_unreadable(result.error)
                continue
            name = names[str(result.source)]
            if "yolo" in args.format:
                write_yolo_labels(output_dir / "labels" / f"{name}.txt", result)
            if args.save_images:
                drawn = result.draw()
                drawn.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))
                drawn.save(output_dir / f"{name}.jpg", quality=92)
    finally:
        config = detector.model.config
        write_results(
            output_dir,
            args.format,
            results,
            names,
            category_ids=config.category_ids,
            class_names=config.class_names,
        )
    print(f"{len(results)} images, {sum(map(len, results))} objects")
    return num_errors


def predict_video(args: PredictArguments, detector: Pix2Seq, source: str, name: str) -> int:
    """Writes a line of JSON per frame, and the video with its boxes. Returns 1 if it cannot be read completely."""
    webcam, count = is_webcam(source), 0
    try:
        video = VideoReader(int(source) if webcam else source)
    except BadImageError as error:
        _print_unreadable(f"{source}: {error}")
        return 1
    json_path, video_path = (Path(args.output_dir) / f"{name}{suffix}" for suffix in (".jsonl", ".mp4"))
    frames = progress(video, f"predicting {sanitize(source)}", video.num_frames)
    with contextlib.closing(video), json_path.open("w") as lines, contextlib.ExitStack() as stack:
        append = stack.enter_context(open_video_writer(video_path, video.frame_rate)) if args.save_images else None
        try:
            batch_size = 1 if webcam else args.batch_size
            for batch in iter(lambda: list(itertools.islice(frames, batch_size)), []):
                for result in detector.stream(batch, args.threshold, args.classes, batch_size):
                    _exit_if_terminated()
                    objects = coco_entries(result, count, detector.model.config.category_ids)
                    line = {"frame": count, "time": count / video.frame_rate, "objects": objects}
                    lines.write(json.dumps(line) + "\n")
                    count += 1
                    if append is not None:
                        append(result.draw())
        except KeyboardInterrupt:
            if not webcam:  # Ctrl-C is the normal end of a webcam
                raise
    print(f"{sanitize(source)}: {count} frames")
    if count == 0:
        json_path.unlink()
        _print_unreadable(f"{source}: contains no video frame")
        return 1
    if count < 0.95 * video.num_frames < math.inf:  # the number is an estimate for some files
        _print_unreadable(f"{source}: only {count} of its {video.num_frames} frames")
        return 1
    return 0


def predict(args: PredictArguments) -> int:
    """Detects objects and writes the results.

    Returns:
        0, or 2 if an input cannot be read.

    Raises:
        UserError: An argument is not valid, or the results cannot be written.
    """
    inputs, skipped = find_inputs(args.inputs, Path(args.output_dir))
    names = unique_names(inputs)
    videos = [path for path in inputs if is_video(path)]
    images = [path for path in inputs if not is_video(path)]
    if videos:
        import_opencv(videos[0])

    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ImageFile has a limit of its own
    model = load_model(args.checkpoint, "--checkpoint")
    try:
        detector = Pix2Seq(model, args.device, args.dtype, **args.decoding())
        detector.labels_of(args.classes)
    except UserError as error:
        raise UserError(f"--{error}") from None
    if detector.device.type == "cpu":
        reuse_freed_memory()

    prepare_output_dir(Path(args.output_dir), output_files(args, images, videos, names), inputs, args.overwrite)
    if skipped:
        first = f"{', '.join(map(sanitize, skipped[:3]))}{', ...' if len(skipped) > 3 else ''}"
        print(f"skipped {len(skipped)} files that are not images by their suffix: {first}", file=sys.stderr)
    num_errors = 0
    try:
        if images:
            num_errors += predict_images(args, detector, images, names)
        for video in videos:
            num_errors += predict_video(args, detector, video, names[video])
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--output_dir {args.output_dir}: cannot be written to ({reason})") from None
    print(f"written to {sanitize(args.output_dir)}")
    if num_errors:
        print(f"{num_errors} of {len(inputs)} inputs cannot be read", file=sys.stderr)
    return 2 if num_errors else 0


def _print_unreadable(message: str) -> None:
    tqdm.write(f"cannot be read: {sanitize(message)}", file=sys.stderr)


_received_signals: list[int] = []


def _handle_sigterm(number: int, frame) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends a second signal, which would interrupt the writing
    _received_signals.append(number)
    _exit_if_terminated()


def _exit_if_terminated() -> None:
    """Raises SystemExit after SIGTERM. Called for each image, because Python may drop an exception of the handler."""
    if _received_signals:
        sys.exit(128 + _received_signals[0])


def run_prediction(args: PredictArguments) -> int:
    """Calls `predict`; after Ctrl-C and SIGTERM it prints a line and returns 130 and 143."""
    _received_signals.clear()
    previous = signal.signal(signal.SIGTERM, _handle_sigterm)
    try:
        return predict(args)
    except (KeyboardInterrupt, SystemExit):
        written = "; the results so far are written" if Path(args.output_dir).exists() else ""
        print(f"predict.py: interrupted{written}", file=sys.stderr)
        return 128 + (_received_signals[0] if _received_signals else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def main(argv: list[str] | None = None, program: str = "predict.py") -> int:
    """Parses the command line and predicts; returns the exit code."""
    return run_command(run_prediction, parse(PredictArguments, argv, program), program=program)
