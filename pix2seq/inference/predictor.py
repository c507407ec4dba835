"""A trained detector in Python: pictures as one has them go in, boxes with names come out."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.argument_parser import did_you_mean
from pix2seq.data import EvalDataset, eval_loader
from pix2seq.data.image_files import BadImageError, ImageFile, open_file
from pix2seq.data.issues import listed
from pix2seq.errors import UserError
from pix2seq.generation import DecodingOptions, NonFiniteLogits
from pix2seq.models import Pix2SeqForObjectDetection, load_model
from pix2seq.transforms import EvalTransform, from_pil, pixels_of, to_original_pixels
from pix2seq.visualization import CELL, color_of, draw_boxes, enlarge

Source = str | Path | Image.Image | np.ndarray
Precision = Literal["float32", "bfloat16", "float16"]
OPTIONS = {option.name: option.type for option in fields(DecodingOptions)}
NUMBERS = {name: kind for name, kind in OPTIONS.items() if kind in (int, float)}
NUMBERS |= {"threshold": float, "batch_size": int, "num_workers": int}


@dataclass
class DetectionResult:
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
        image = to_pil_image(pixels_of(open_image(self.source)))
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
        for name in decoding:
            if name not in OPTIONS:
                raise UserError(f"{name}: no such option{did_you_mean(name, OPTIONS)}")
        _check_numbers(decoding)
        try:
            self.options = model.override_options(**decoding)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str | None = None, dtype: Precision = "float32", **decoding
    ) -> "Pix2Seq":
        """The detector in a folder or on the hub."""
        return cls(load_model(name, "detector"), device, dtype, **decoding)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, by label."""
        return self.model.config.class_names

    def labels(self, names: str | Sequence[str] | None) -> list[int]:
        """Those of classes by their names. Raises UserError."""
        names = [names] if isinstance(names, str) else names or ()
        for name in names:
            if name not in self.names:
                guess = did_you_mean(str(name), self.names) or f"; it knows {listed(self.names)}"
                raise UserError(f"classes {name}: the detector knows no such class{guess}")
        return [label for label, name in enumerate(self.names) if name in names]

    def __call__(
        self,
        images: Source | Sequence[Source],
        threshold: float = 0.5,
        classes: str | Sequence[str] = (),
        batch_size: int = 8,
    ) -> DetectionResult | list[DetectionResult]:
        """What is found in a picture, or in each of a list of them: scores above `threshold`, of these classes only
        if some are named. Raises ValueError for what cannot be read, and UserError, which is one."""
        sources = images if isinstance(images, list | tuple) else [images]
        found = list(self.stream(sources, threshold, classes, batch_size))
        for one in found:
            if one.unreadable:
                raise BadImageError("unreadable-file", one.unreadable)
        return found if sources is images else found[0]

    def stream(
        self,
        sources: Sequence[Source],
        threshold: float = 0.5,
        classes: str | Sequence[str] = (),
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> Iterator[DetectionResult]:
        """As a call, picture by picture, with `num_workers` processes that read. What cannot be read is told by
        `unreadable`. Raises UserError."""
        _check_numbers({"threshold": threshold, "batch_size": batch_size, "num_workers": num_workers})
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: must be at least 1, and 0")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold {threshold}: must be 0 to 1")
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
                yield DetectionResult(
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

    def image_file(self, index: int) -> ImageFile | torch.Tensor:
        return open_image(self.sources[index])

    def name(self, index: int) -> str:
        source = self.sources[index]
        return str(source) if isinstance(source, str | Path) else f"picture {index}"


def open_image(source: Source) -> ImageFile | torch.Tensor:
    """A file of which the header is read, or pixels uint8 (3, H, W); upright, as viewers show it. Raises BadImageError for
    what cannot be read, ValueError for what is no picture."""
    if isinstance(source, str | Path):
        return open_file(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(f"an array of shape {source.shape} and type {source.dtype}: must be uint8 (H, W, 3), RGB")
        source = Image.fromarray(source)
    if not isinstance(source, Image.Image):
        raise ValueError(f"a picture of type {type(source).__name__}: must be a path, PIL or an array")
    if 0 in source.size:
        raise ValueError(f"a picture of {source.width} x {source.height} pixels: must have some")
    try:
        return from_pil(ImageOps.exif_transpose(source))
    except Exception as error:  # PIL reads a file's pixels as late as here, and each decoder makes an error of its own
        raise BadImageError("unreadable-file", error) from None


def _check_numbers(options: dict) -> None:
    """Raises UserError for one that must be a number and is none, as NaN."""
    for name, value in options.items():
        kind = NUMBERS.get(name)  # decoding has others, too
        if kind and (not isinstance(value, Integral if kind is int else Real) or value != value):
            raise UserError(f"{name} {value!r}: must be a {'whole ' * (kind is int)}number")


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()  # boxes are made of these; Apple's GPUs have none
    except Exception as error:  # each backend makes an error of its own
        why = str(error).splitlines()[0][:120]  # of a list of all that PyTorch can be built with
        raise UserError(f"device {name}: cannot be used here: cpu, cuda, or cuda:1 and so on ({why})") from None
    return torch.device(name)
