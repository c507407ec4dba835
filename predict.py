"""Finds objects in pictures and videos.

    python predict.py image.jpg folder/ "more/*.png" --checkpoint OUT/best --output_dir P
    python predict.py clip.mp4 0 --checkpoint OUT/best --output_dir P      a video file and a webcam

P/predictions.json has what was found, P/NAME.jpg shows it. What cannot be read is told and the rest is done; the exit
code is 2 then, as for a mistake in the flags, which is told before any work. Ctrl-C (130) and SIGTERM (143)
end it early, and what was found until then is written.
"""

import csv
import itertools
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from pix2seq.command_line import parse
from pix2seq.config import DecodingArguments, flag
from pix2seq.errors import UserError
from pix2seq.evaluation import coco_results
from pix2seq.model import load_detector
from pix2seq.predictor import NOT_REGULAR, Found, Pix2Seq, Precision, find_files, is_camera, is_not_regular
from pix2seq.progress import progress

FILES = {"coco": ("predictions.json", "images.json"), "yolo": ("classes.txt",), "csv": ("predictions.csv",)}
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
MOST_JPEG_PIXELS = 65500  # of a side
COLUMNS = ("file_name", "class", "score", "x1", "y1", "x2", "y2")


@dataclass
class PredictArguments(DecodingArguments):
    WORDS: ClassVar = "inputs"

    inputs: list[str] = flag(
        [], "pictures, folders of them, globs, video files, or the number of a webcam; also without this flag"
    )
    checkpoint: str | None = flag(None, "folder of a trained detector: OUT/best, OUT/final or a checkpoint")
    output_dir: str = flag("predictions", "where everything goes")
    format: list[str] = flag(["coco"], "coco, yolo, csv, or several of them")
    pictures: bool = flag(True, "write the pictures with their boxes too")
    threshold: float = flag(0.5, "only objects of a higher score")
    classes: list[str] = flag([], "only objects of these classes, by name")
    batch_size: int = flag(8, "pictures at a time")
    num_workers: int = flag(2, "processes that read pictures")
    device: str | None = flag(None, "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    dtype: Precision = flag("float32", "precision of the computation")
    overwrite: bool = flag(False, "replace files of earlier predictions")

    def __post_init__(self):
        if self.checkpoint is None:
            raise ValueError("--checkpoint: missing (the folder of a trained detector)")
        for name in self.format:
            if name not in FILES:
                raise ValueError(f"--format {name}: must be {', '.join(FILES)}, or several of them")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: must be 0 to 1")
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(f"--batch_size {self.batch_size}, --num_workers {self.num_workers}: at least 1, and 0")
        super().__post_init__()


def name_files(paths: list[str]) -> dict[str, str]:
    """What is written for each is called as it is, without suffix; numbered where that is taken."""
    names, taken = {}, set()
    for path in paths:
        stem = f"webcam_{path}" if is_camera(path) else Path(path).stem
        choices = (stem if number == 1 else f"{stem}_{number}" for number in itertools.count(1))
        # Some file systems do not tell large letters from small ones.
        names[path] = next(choice for choice in choices if choice.casefold() not in taken)
        taken.add(names[path].casefold())
    return names


def make_room(args: PredictArguments, pictures: list[str], videos: list[str], names: dict[str, str]) -> Path:
    """The output folder, in which nothing is lost. Raises UserError."""
    output, where = Path(args.output_dir), f"--output_dir {args.output_dir}"
    files = [file for name in args.format for file in FILES[name]] if pictures else []
    files += [f"labels/{names[path]}.txt" for path in pictures] if "yolo" in args.format else []
    files += [f"{names[path]}.jpg" for path in pictures] if args.pictures else []
    files += [f"{names[path]}.jsonl" for path in videos]
    files += [f"{names[path]}.mp4" for path in videos] if args.pictures else []
    sources = {os.path.realpath(path) for path in names}
    there = [file for file in files if (output / file).exists()]
    if lost := [file for file in there if os.path.realpath(output / file) in sources]:
        raise UserError(f"{where}: {lost[0]} would take the place of an input; name another folder")
    if there and not args.overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{where}: {there[0]}{more} is there already; name another folder, or say --overwrite")
    try:
        for folder in {(output / file).parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(None, "no permission to write")
    except OSError as error:
        raise UserError(f"{where}: cannot be written to ({error.strerror})") from None
    return output


def results(found: Found, image_id: int, detector: Pix2Seq) -> list[dict]:
    """Entries of a COCO results file that say the class's name, too."""
    rows = coco_results(image_id, found, detector.model.config.category_ids)
    return [row | {"category_name": name} for row, name in zip(rows, found.names, strict=True)]


def yolo_lines(found: Found) -> str:
    """For each object: class, centre and size as fractions of the picture, score."""
    height, width = found.size
    lines = []
    for label, (x1, y1, x2, y2), score in zip(found.labels, found.boxes, found.scores, strict=True):
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n")
    return "".join(lines)


def predict_pictures(
    args: PredictArguments, detector: Pix2Seq, pictures: list[str], names: dict[str, str], output: Path
) -> Iterator[str]:
    """What cannot be read. Whatever ends the work, what was found so far is written."""
    rows, images, table = [], [], []
    stream = detector.stream(pictures, args.threshold, args.classes, args.batch_size, args.num_workers)
    try:
        for number, found in enumerate(progress(stream, "predicting", len(pictures)), start=1):
            name = names[found.source]
            image = {"id": number, "file_name": found.source, "name": name}
            if found.unreadable:
                yield found.unreadable
                images.append(image | {"unreadable": found.unreadable})
                continue
            images.append(image | {"height": found.size[0], "width": found.size[1]})
            rows += [row | {"file_name": found.source} for row in results(found, number, detector)]
            for class_name, score, box in zip(found.names, found.scores, found.boxes, strict=True):
                table.append((found.source, class_name, float(score), *box.tolist()))
            if "yolo" in args.format:
                (output / "labels" / f"{name}.txt").write_text(yolo_lines(found))
            if args.pictures:
                drawn = found.draw()
                drawn.thumbnail((MOST_JPEG_PIXELS, MOST_JPEG_PIXELS))
                drawn.save(output / f"{name}.jpg", quality=92)
    finally:
        if "coco" in args.format:
            (output / "predictions.json").write_text(json.dumps(rows))
            (output / "images.json").write_text(json.dumps(images))
        if "yolo" in args.format:
            (output / "classes.txt").write_text("".join(f"{name}\n" for name in detector.names), "utf-8")
        if "csv" in args.format:
            with (output / "predictions.csv").open(
                "w", newline="", encoding="utf-8", errors="surrogateescape"
            ) as file:
                csv.writer(file).writerows([COLUMNS, *table])
    print(f"{len(images)} pictures, {len(rows)} objects")


def opencv(video: str):
    """The package that reads and writes videos. Raises UserError."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is told in a line of ours
    try:
        import cv2
    except ImportError:
        raise UserError(f"{video}: videos need OpenCV: pip install opencv-python-headless") from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def frames_of(capture) -> Iterator[np.ndarray]:
    """As RGB. OpenCV's colours are the other way around."""
    while (frame := capture.read()[1]) is not None:
        yield np.ascontiguousarray(frame[..., ::-1])


def predict_video(args: PredictArguments, detector: Pix2Seq, video: str, output: Path) -> Iterator[str]:
    """Writes a line of JSON for each frame, and the video with its boxes, to `output` and a suffix. What cannot be
    read."""
    cv2, camera = opencv(video), is_camera(video)
    if is_not_regular(video):
        yield f"{video}: {NOT_REGULAR}"
        return
    capture = cv2.VideoCapture(int(video) if camera else video)
    announced, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate < 1000 else 30.0  # some containers and cameras do not know
    total = math.inf if camera or announced <= 0 else int(announced)
    frames = progress(frames_of(capture), f"predicting {video}", total)
    writer, count = None, 0
    try:
        with open(f"{output}.jsonl", "w") as lines:
            # A camera is shown as it goes.
            while batch := list(itertools.islice(frames, 1 if camera else args.batch_size)):
                for found in detector(batch, args.threshold, args.classes, args.batch_size):
                    objects = results(found, count, detector)
                    lines.write(json.dumps({"frame": count, "time": count / rate, "objects": objects}) + "\n")
                    count += 1
                    if args.pictures:
                        drawn = found.draw()
                        if writer is None:
                            code = cv2.VideoWriter_fourcc(*"mp4v")
                            writer = cv2.VideoWriter(f"{output}.mp4", code, rate, drawn.size)
                            if not writer.isOpened():
                                raise UserError(f"{output}.mp4: OpenCV cannot write it")
                        writer.write(np.ascontiguousarray(np.asarray(drawn)[..., ::-1]))
    except KeyboardInterrupt:
        if not camera:  # which nothing else ends
            raise
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    print(f"{video}: {count} frames")
    if count == 0:
        yield f"{video}: no frame of a video in it"
    elif count < 0.95 * total < math.inf:  # of some files the number is an estimate
        yield f"{video}: only {count} of its {total} frames"


def main(args: PredictArguments) -> int:
    """Writes what was found; 2 if something could not be read, else 0. Raises UserError."""
    files, left_out = find_files(args.inputs, Path(args.output_dir))
    videos = [path for path in files if is_camera(path) or Path(path).suffix.lower() in VIDEO_SUFFIXES]
    pictures, names = [path for path in files if path not in videos], name_files(files)
    if videos:
        opencv(videos[0])
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # how many pixels are too many is checked by us
    model = load_detector(args.checkpoint, "--checkpoint")
    try:
        detector = Pix2Seq(model, args.device, args.dtype, **args.decoding())
        detector.labels(args.classes)
    except UserError as error:
        raise UserError(f"--{error}") from None
    output = make_room(args, pictures, videos, names)
    if left_out:
        shown = f"{', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}"
        print(f"left out, no pictures by their names: {len(left_out)} files: {shown}", file=sys.stderr)
    work = [predict_pictures(args, detector, pictures, names, output)] if pictures else []
    work += [predict_video(args, detector, video, output / names[video]) for video in videos]
    faults = 0
    try:
        for fault in itertools.chain(*work):
            faults += 1
            tqdm.write(f"cannot be read: {fault}", file=sys.stderr)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be written to ({error.strerror or error})") from None
    print(f"written to {output}")
    if faults:
        print(f"{faults} of {len(files)} could not be read", file=sys.stderr)
    return 2 if faults else 0


def terminate(number: int, frame) -> None:
    """Handles SIGTERM, which ends a webcam's pictures and all that would come after them."""
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends a second one, which would break off the writing
    sys.exit(128 + number)


def run(args: PredictArguments) -> int:
    """`main` with mistakes of the user turned into one line and exit code 2, and signals into 128 and their number."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        return main(args)
    except UserError as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as ended:
        print("predict.py: interrupted; what was found so far is written", file=sys.stderr)
        return ended.code if isinstance(ended, SystemExit) else 130


if __name__ == "__main__":
    sys.exit(run(parse(PredictArguments)))
