"""Reads video files and webcams, and writes videos. Needs OpenCV."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pix2seq.data.image_files import check_regular
from pix2seq.errors import UserError


def import_opencv(video: str):
    """Imports OpenCV and turns off its log. Raises UserError that names the video if OpenCV is not installed."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise UserError(f"{video}: videos need OpenCV: pip install opencv-python-headless") from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


class VideoReader:
    """Iterates over the frames of a video: uint8 RGB arrays (H, W, 3).

    Args:
        source: Video file, or number of a webcam.

    Attributes:
        frame_rate: Frames per second; 30 if it is unknown.
        num_frames: Frames according to the header, which may be an estimate; infinity if the number is unknown.

    Raises:
        UserError: OpenCV is not installed.
        BadImageError: The source is not a regular file.
    """

    def __init__(self, source: str | int):
        cv2 = import_opencv(str(source))
        if isinstance(source, str):
            check_regular(source)
        self._capture = cv2.VideoCapture(source)
        count, rate = self._capture.get(cv2.CAP_PROP_FRAME_COUNT), self._capture.get(cv2.CAP_PROP_FPS)
        self.frame_rate = rate if 0 < rate < 1000 else 30.0
        self.num_frames = int(count) if isinstance(source, str) and count > 0 else math.inf

    def __iter__(self) -> Iterator[np.ndarray]:
        while (frame := self._capture.read()[1]) is not None:
            yield np.ascontiguousarray(frame[..., ::-1])  # OpenCV uses BGR

    def close(self) -> None:
        self._capture.release()


@contextlib.contextmanager
def open_video_writer(path: Path, frame_rate: float) -> Iterator[Callable[[Image.Image], None]]:
    """Opens a video for writing.

    Args:
        path: MP4 file.
        frame_rate: Frames per second.

    Yields:
        A function that appends a frame. All frames must have the same size.

    Raises:
        UserError: OpenCV could not write all frames.
    """
    cv2, writer, count = import_opencv(str(path)), None, 0

    def append(frame: Image.Image) -> None:
        nonlocal writer, count
        if writer is None:
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), frame_rate, frame.size)
        writer.write(np.asarray(frame)[..., ::-1].copy())
        count += 1

    try:
        yield append
    finally:
        if writer is not None:
            writer.release()
    # OpenCV does not report errors of writing.
    if count and cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) < count:
        raise UserError(f"{path}: OpenCV could not write all frames; check the free disk space")
