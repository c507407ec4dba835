"""A trained detector in Python: pictures as one has them go in, boxes with names come out."""

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from pix2seq.command_line import nearest
from pix2seq.data import EvalDataset, eval_loader
from pix2seq.data.images import FORMATS_OF_SUFFIX, BadImage, Folder, Picture, as_rgb
from pix2seq.decoding import DecodingOptions, NonFiniteLogits
from pix2seq.errors import UserError
from pix2seq.model import Pix2SeqForObjectDetection, load_detector
from pix2seq.transforms import EvalTransform, to_original_pixels
from pix2seq.visualize import CELL, color_of, draw_boxes, enlarge

Source = str | Path | Image.Image | np.ndarray
Precision = Literal["float32", "bfloat16", "float16"]
NOT_REGULAR = "not a regular file, and only these are opened"
NUMBERS = {option.name: option.type for option in fields(DecodingOptions) if option.type in (int, float)}
NUMBERS |= {"threshold": float, "batch_size": int, "num_workers": int}


@dataclass
class Found:
    """What was found in a picture, best score first.

    source      the picture as it was given       size   (height, width) of it
    boxes       float64 (N, 4), xyxy in pixels of the picture, which is turned as its EXIF tag says
    labels      int64 (N,)                        names  of these, N
    scores      float64 (N,)
    unreadable  the picture's name and why it cannot be read, if so
    """

    source: Source = field(repr=False)
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    names: list[str]
    unreadable: str = ""

    def __len__(self) -> int:
        return len(self.boxes)

    def draw(self) -> Image.Image:
        """The picture with its boxes. Small ones are enlarged, so that names are legible."""
        image = to_pil_image(_pixels(open_picture(self.source)))
        image, boxes = enlarge(image, self.boxes, max(CELL, *image.size))
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        colors = [color_of(label) for label in self.labels]
        return draw_boxes(image, boxes, captions, colors, font_size=max(12, min(image.size) // 40))


class Pix2Seq:
    """A trained detector, asked with pictures: files, PIL, or uint8 arrays (H, W, 3) of RGB.

    dtype      the precision it computes in; its weights stay as they are
    decoding   DecodingOptions, where they should differ from the detector's own

    Raises UserError.
    """

    def __init__(
        self,
        model: Pix2SeqForObjectDetection,
        device: str | None = None,
        dtype: Precision = "float32",
        **decoding,
    ):
        self.device = _device(device)
        if dtype not in get_args(Precision):
            raise UserError(f"dtype {dtype}: must be one of {', '.join(get_args(Precision))}")
        if dtype == "float16" and self.device.type == "cpu":
            raise UserError("dtype float16: needs a GPU; use bfloat16 or float32")
        self.dtype = dtype
        self.model = model.to(self.device).eval()
        _check_numbers(decoding)
        try:
            self.options = model.options_with(**decoding)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str | None = None, dtype: Precision = "float32", **decoding
    ) -> "Pix2Seq":
        """The detector in a folder or on the hub."""
        return cls(load_detector(name, "detector"), device, dtype, **decoding)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, by label."""
        return self.model.config.class_names

    def labels(self, names: str | Sequence[str]) -> list[int]:
        """Those of classes by their names. Raises UserError."""
        names = [names] if isinstance(names, str) else names
        for name in names:
            if name not in self.names:
                raise UserError(f"classes {name}: the detector knows no such class{nearest(str(name), self.names)}")
        return [label for label, name in enumerate(self.names) if name in names]

    def __call__(
        self,
        images: Source | Sequence[Source],
        threshold: float = 0.5,
        classes: str | Sequence[str] = (),
        batch_size: int = 8,
    ) -> Found | list[Found]:
        """What is found in a picture, or in each of a list of them: scores above `threshold`, of these classes only
        if some are named. Raises ValueError for what cannot be read, and UserError, which is one."""
        sources = images if isinstance(images, list | tuple) else [images]
        found = list(self.stream(sources, threshold, classes, batch_size))
        for one in found:
            if one.unreadable:
                raise BadImage("unreadable-file", one.unreadable)
        return found if sources is images else found[0]

    def stream(
        self,
        sources: Sequence[Source],
        threshold: float = 0.5,
        classes: str | Sequence[str] = (),
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> Iterator[Found]:
        """As a call, picture by picture, with `num_workers` processes that read. What cannot be read is told by
        `unreadable`. Raises UserError."""
        _check_numbers({"threshold": threshold, "batch_size": batch_size, "num_workers": num_workers})
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: must be at least 1, and 0")
        config, wanted = self.model.config, self.labels(classes)
        data = EvalDataset(_Pictures(sources), EvalTransform(config.image_size))
        for batch in eval_loader(data, batch_size, 0, 1, num_workers):
            indices, sizes = batch["image_id"].tolist(), batch["original_size"].tolist()
            try:
                with self._precision():
                    detections = self.model.detect(batch["pixel_values"].to(self.device), self.options)
            except NonFiniteLogits as error:
                named = ", ".join(data.annotations.name(indices[row]) for row in error.rows)
                raise RuntimeError(f"{named}: the detector's logits are NaN or infinite") from None
            for row, written in enumerate(detections):
                unreadable, size = batch["unreadable"][row], tuple(sizes[row])
                boxes = to_original_pixels(written.boxes, config.image_size, batch["size"][row].tolist(), size)
                order = np.argsort(-written.scores, kind="stable")
                kept = (written.scores > threshold) & (np.isin(written.labels, wanted) if classes else True)
                order = order[kept[order]] if not unreadable else order[:0]
                labels = written.labels[order]
                names = [self.names[label] for label in labels]
                yield Found(
                    sources[indices[row]], size, boxes[order], labels, written.scores[order], names, unreadable
                )

    def _precision(self):
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.dtype))


@dataclass
class _Pictures:
    """Pictures nobody has annotated, as EvalDataset wants them."""

    sources: Sequence[Source]

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def image_ids(self) -> range:
        return range(len(self.sources))

    def picture(self, index: int) -> Picture | torch.Tensor:
        return open_picture(self.sources[index])

    def name(self, index: int) -> str:
        source = self.sources[index]
        return str(source) if isinstance(source, str | Path) else f"picture {index}"


def find_files(words: Sequence[str], output: Path) -> tuple[list[str], list[str]]:
    """What the words name, each once and in their order: files, pictures in folders and below them, what globs match,
    and numbers of webcams. And what else is in these folders, but for the `output`'s. Raises UserError."""
    found, left_out = {}, {}
    if not words:
        raise UserError("no pictures: name files, folders, globs, videos or the number of a webcam")
    for word in words:
        paths = [word] if os.path.exists(word) or is_camera(word) else sorted(glob.glob(word, recursive=True))
        if not paths:
            raise UserError(f"{word}: {'matches nothing' if glob.has_magic(word) else 'no such file or folder'}")
        files = []
        for path in paths:
            pictures, others = _in_folder(Path(path), output) if os.path.isdir(path) else ([path], [])
            files += pictures
            left_out |= {os.path.realpath(file): file for file in others}
        if not files:
            raise UserError(f"{word}: holds no pictures, which are {' '.join(FORMATS_OF_SUFFIX)}")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values()), [file for place, file in left_out.items() if place not in found]


def _in_folder(folder: Path, output: Path) -> tuple[list[str], list[str]]:
    """Pictures by their names, and other files."""
    pictures, others, output = [], [], output.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or (output != folder.resolve() and output in path.resolve().parents):
            continue
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        is_picture = path.suffix.lower() in FORMATS_OF_SUFFIX and not hidden
        (pictures if is_picture else others).append(str(path))
    return pictures, others


def is_camera(word: str) -> bool:
    return word.isdecimal() and not os.path.exists(word)


def is_not_regular(path: str | Path) -> bool:
    """There, but a pipe, device, socket or folder: opening it may take for ever."""
    return os.path.exists(path) and not os.path.isfile(path)


def open_picture(source: Source) -> Picture | torch.Tensor:
    """A file of which the header is read, or pixels uint8 (3, H, W); upright, as viewers show it. Raises BadImage for
    a file, ValueError for what is no picture."""
    if isinstance(source, str | Path):
        if is_not_regular(source):
            raise BadImage("unreadable-file", NOT_REGULAR)
        return Picture(Folder(Path(source).parent).read(Path(source).name), upright=True)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(f"an array of shape {source.shape} and type {source.dtype}: must be uint8 (H, W, 3), RGB")
        source = Image.fromarray(source)
    if not isinstance(source, Image.Image):
        raise ValueError(f"a picture of type {type(source).__name__}: must be a path, PIL or an array")
    if 0 in source.size:
        raise ValueError(f"a picture of {source.width} x {source.height} pixels: must have some")
    return pil_to_tensor(as_rgb(ImageOps.exif_transpose(source)))


def _check_numbers(options: dict) -> None:
    """Raises UserError for one that must be a number and is none."""
    for name, value in options.items():
        kind = NUMBERS.get(name)  # decoding has others, too
        if kind and not isinstance(value, Integral if kind is int else Real):
            raise UserError(f"{name} {value!r}: must be a {'whole ' * (kind is int)}number")


def _pixels(picture: Picture | torch.Tensor) -> torch.Tensor:
    return picture.pixels() if isinstance(picture, Picture) else picture


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=torch.float64, device=name)  # boxes are made of these; Apple's GPUs have none
    except Exception as error:  # each backend makes an error of its own
        raise UserError(f"device {name}: cannot be used ({str(error).splitlines()[0]})") from None
    return torch.device(name)
