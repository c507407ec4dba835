"""Videos and webcams as frames, and frames as a video. OpenCV does both, and nothing else needs it."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pix2seq.data.image_files import check_regular
from pix2seq.errors import UserError


def opencv(video: str):
    """The package that reads and writes videos. Raises UserError."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is told in a line of ours
    try:
        import cv2
    except ImportError:
        raise UserError(f"{video}: videos need OpenCV: pip install opencv-python-headless") from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


class Video:
    """The frames of a video file, or of a webcam by its number: uint8 RGB (H, W, 3). Raises UserError and BadImageError.

    rate    frames a second
    total   how many there are by what the file says, which may be an estimate; infinity where nobody knows
    """

    def __init__(self, source: str | int):
        cv2 = opencv(str(source))
        if isinstance(source, str):
            check_regular(source)
        self._capture = cv2.VideoCapture(source)
        announced, rate = self._capture.get(cv2.CAP_PROP_FRAME_COUNT), self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else 30.0  # some containers and cameras do not know
        self.total = int(announced) if isinstance(source, str) and announced > 0 else math.inf

    def __iter__(self) -> Iterator[np.ndarray]:
        while (frame := self._capture.read()[1]) is not None:
            yield np.ascontiguousarray(frame[..., ::-1])  # OpenCV's colours are the other way around

    def close(self) -> None:
        self._capture.release()


@contextlib.contextmanager
def video_writer(path: Path, rate: float) -> Iterator[Callable[[Image.Image], None]]:
    """What appends a frame to a video that is made with the first of them; all are of one size. Raises UserError."""
    cv2, writer, count = opencv(str(path)), None, 0

    def write(frame: Image.Image) -> None:
        nonlocal writer, count
        if writer is None:
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, frame.size)
        writer.write(np.asarray(frame)[..., ::-1].copy())
        count += 1

    try:
        yield write
    finally:
        if writer is not None:
            writer.release()
    # OpenCV keeps to itself what went wrong.
    if count and cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) < count:
        raise UserError(f"{path}: OpenCV could not write all of it")
