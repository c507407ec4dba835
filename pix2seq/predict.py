"""Finds objects in pictures and videos.

    python predict.py image.jpg folder/ "more/*.png" --checkpoint OUT/best --output_dir P
    python predict.py clip.mp4 0 --checkpoint OUT/best --output_dir P      a video file and a webcam

P/predictions.json has what was found, P/NAME.jpg shows it. What cannot be read is told and the rest is done; the exit
code is 2 then, as for a mistake in the flags, which is told before any work. Ctrl-C (130) and SIGTERM (143)
end it early, and what was found until then is written.
"""

import contextlib
import itertools
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, run_command
from pix2seq.arguments import DecodingArguments, argument
from pix2seq.data.image_files import BadImageError
from pix2seq.data.issues import shown
from pix2seq.errors import UserError
from pix2seq.inference.inputs import find_inputs, is_camera, is_video, name_inputs
from pix2seq.inference.predictor import Pix2Seq, Precision
from pix2seq.inference.result_files import FORMATS, ResultFolder, coco_rows, write_labels, write_results
from pix2seq.inference.video import Video, opencv, video_writer
from pix2seq.models import load_model
from pix2seq.progress import progress

MOST_JPEG_PIXELS = 65500  # of a side


@dataclass
class PredictArguments(DecodingArguments):
    POSITIONAL: ClassVar = "inputs"

    inputs: list[str] = argument(
        [], "pictures, folders of them, globs, video files, or the number of a webcam; also without this flag"
    )
    checkpoint: str | None = argument(None, "folder of a trained detector: OUT/best, OUT/final or a checkpoint")
    output_dir: str = argument("predictions", "where everything goes")
    format: list[str] = argument(["coco"], "coco, yolo, csv, or several of them")
    pictures: bool = argument(True, "write the pictures with their boxes too")
    threshold: float = argument(0.5, "only objects of a higher score")
    classes: list[str] = argument([], "only objects of these classes, by name")
    batch_size: int = argument(8, "pictures at a time")
    num_workers: int = argument(2, "processes that read pictures")
    device: str | None = argument(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    dtype: Precision = argument("float32", "precision of the computation")
    overwrite: bool = argument(False, "remove what earlier predictions wrote there")

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("--checkpoint: missing (the folder of a trained detector)")
        for name in self.format:
            if name not in FORMATS:
                raise ValueError(f"--format {name}: must be {', '.join(FORMATS)}, or several of them")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: must be 0 to 1")
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(f"--batch_size {self.batch_size}, --num_workers {self.num_workers}: at least 1, and 0")
        super().__post_init__()


def files_of(args: PredictArguments, pictures: list[str], videos: list[str], names: dict[str, str]) -> list[str]:
    """All that is going to be written."""
    files = [file for name in args.format for file in FORMATS[name]] if pictures else []
    files += [f"labels/{names[path]}.txt" for path in pictures] if "yolo" in args.format else []
    files += [f"{names[path]}.jpg" for path in pictures] if args.pictures else []
    files += [f"{names[path]}.jsonl" for path in videos]
    return files + ([f"{names[path]}.mp4" for path in videos] if args.pictures else [])


def predict_pictures(
    args: PredictArguments, detector: Pix2Seq, pictures: list[str], names: dict[str, str], folder: ResultFolder
) -> Iterator[str]:
    """What cannot be read. Whatever ends the work, what was found so far is written."""
    done = []
    stream = detector.stream(pictures, args.threshold, args.classes, args.batch_size, args.num_workers)
    try:
        for found in progress(stream, "predicting", len(pictures)):
            _check_terminated()
            done.append(found)
            if found.unreadable:
                yield found.unreadable
                continue
            if "yolo" in args.format:
                write_labels(folder, found, names[found.source])
            if args.pictures:
                drawn = found.draw()
                drawn.thumbnail((MOST_JPEG_PIXELS, MOST_JPEG_PIXELS))
                with folder.writing(f"{names[found.source]}.jpg") as path:
                    drawn.save(path, quality=92)
    finally:
        write_results(folder, args.format, done, names, detector.model.config)
    print(f"{len(done)} pictures, {sum(map(len, done))} objects")


def predict_video(
    args: PredictArguments, detector: Pix2Seq, source: str, name: str, folder: ResultFolder
) -> Iterator[str]:
    """Writes a line of JSON for each frame, and the video with its boxes. What cannot be read."""
    camera, count = is_camera(source), 0
    try:
        video = Video(int(source) if camera else source)
    except BadImageError as bad:
        yield f"{source}: {bad}"
        return
    frames = progress(video, f"predicting {shown(source)}", video.total)
    with contextlib.closing(video), contextlib.ExitStack() as files:
        lines = files.enter_context(files.enter_context(folder.writing(f"{name}.jsonl")).open("w"))
        if args.pictures:
            write = files.enter_context(video_writer(files.enter_context(folder.writing(f"{name}.mp4")), video.rate))
        try:
            size = 1 if camera else args.batch_size  # a camera is shown as it goes
            batches = iter(lambda: list(itertools.islice(frames, size)), [])
            stream = (detector(batch, args.threshold, args.classes, size) for batch in batches)
            for found in itertools.chain.from_iterable(stream):
                _check_terminated()
                objects = coco_rows(found, count, detector.model.config.category_ids)
                lines.write(json.dumps({"frame": count, "time": count / video.rate, "objects": objects}) + "\n")
                count += 1
                if args.pictures:
                    write(found.draw())
        except KeyboardInterrupt:
            if not camera:  # which nothing else ends
                raise
    print(f"{shown(source)}: {count} frames")
    if count == 0:
        (folder.path / f"{name}.jsonl").unlink()
        yield f"{source}: no frame of a video in it"
    elif count < 0.95 * video.total < float("inf"):  # of some files the number is an estimate
        yield f"{source}: only {count} of its {video.total} frames"


def predict(args: PredictArguments) -> int:
    """Writes what was found; 2 if something could not be read, else 0. Raises UserError."""
    inputs, left_out = find_inputs(args.inputs, Path(args.output_dir))
    names = name_inputs(inputs)
    videos = [path for path in inputs if is_video(path)]
    pictures = [path for path in inputs if not is_video(path)]
    if videos:
        opencv(videos[0])

    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # how many pixels are too many is checked by us
    model = load_model(args.checkpoint, "--checkpoint")
    try:
        detector = Pix2Seq(model, args.device, args.dtype, **args.decoding())
        detector.labels(args.classes)
    except UserError as error:
        raise UserError(f"--{error}") from None

    files = files_of(args, pictures, videos, names)
    folder = ResultFolder(Path(args.output_dir), files, inputs, args.overwrite)
    if left_out:
        first = f"{', '.join(map(shown, left_out[:3]))}{', ...' if len(left_out) > 3 else ''}"
        print(f"left out, no pictures by their names: {len(left_out)} files: {first}", file=sys.stderr)
    work = [predict_pictures(args, detector, pictures, names, folder)] if pictures else []
    work += [predict_video(args, detector, video, names[video], folder) for video in videos]
    faults = 0
    try:
        for fault in itertools.chain(*work):
            faults += 1
            tqdm.write(f"cannot be read: {shown(fault)}", file=sys.stderr)
    except OSError as error:
        raise UserError(f"--output_dir {folder.path}: cannot be written to ({error.strerror or error})") from None
    print(f"written to {shown(args.output_dir)}")
    if faults:
        print(f"{faults} of {len(inputs)} could not be read", file=sys.stderr)
    return 2 if faults else 0


terminated: list[int] = []  # signals


def terminate(number: int, frame) -> None:
    """Handles SIGTERM, which ends a webcam's pictures and all that would come after them."""
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends a second one, which would break off the writing
    terminated.append(number)
    _check_terminated()


def _check_terminated() -> None:
    """Also at each picture: while processes are started, what a handler raises may be dropped."""
    if terminated:
        sys.exit(128 + terminated[0])


def run_prediction(args: PredictArguments) -> int:
    """`main` with mistakes of the user turned into one line and exit code 2, and signals into 128 and their number."""
    terminated.clear()
    signal.signal(signal.SIGTERM, terminate)
    try:
        return predict(args)
    except (KeyboardInterrupt, SystemExit) as ended:
        kept = "; what was found so far is written" if Path(args.output_dir).exists() else ""
        print(f"predict.py: interrupted{kept}", file=sys.stderr)
        return ended.code if isinstance(ended, SystemExit) else 130


def main(argv: list[str] | None = None, program: str = "predict.py") -> int:
    """Parses the command line and predicts; returns the exit code."""
    return run_command(run_prediction, parse(PredictArguments, argv, program), program=program)
