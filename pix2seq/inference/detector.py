"""The class `Pix2Seq`: a trained model that takes images and returns boxes with class names."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from pix2seq.argument_parser import did_you_mean
from pix2seq.data import EvalDataset, eval_loader
from pix2seq.data.image_files import BadImageError
from pix2seq.data.issues import join_names
from pix2seq.errors import UserError
from pix2seq.generation import DecodingOptions, NonFiniteLogits
from pix2seq.inference.images import ImageList, ImageSource
from pix2seq.inference.results import DetectionResult
from pix2seq.models import Pix2SeqForObjectDetection, load_model
from pix2seq.transforms import EvalTransform, to_original_pixels

Precision = Literal["float32", "bfloat16", "float16"]


class Pix2Seq:
    """Detects objects in images with a trained model.

    Example::

        detector = Pix2Seq.from_pretrained("runs/demo/best")
        result = detector("image.jpg", threshold=0.5)
        print(result.names, result.scores, result.boxes)

    Args:
        model: A trained model; it is moved to `device` and put in eval mode.
        device: "cpu", "cuda", "cuda:1", ... Default: a GPU if there is one.
        dtype: Precision of the computation (autocast); the weights keep their type.
        **decoding: Fields of `DecodingOptions` that differ from the values the model was evaluated with.

    Raises:
        UserError: An argument is not valid.
    """

    def __init__(
        self,
        model: Pix2SeqForObjectDetection,
        device: str | None = None,
        dtype: Precision = "float32",
        **decoding,
    ):
        self.device = _usable_device(device)
        if dtype not in get_args(Precision):
            raise UserError(f"dtype {dtype}: must be one of {', '.join(get_args(Precision))}")
        if dtype == "float16" and self.device.type == "cpu":
            raise UserError("dtype float16: needs a GPU; use bfloat16 or float32")
        self.dtype = dtype
        self.model = model.to(self.device).eval()
        option_names = [option.name for option in fields(DecodingOptions)]
        for name in decoding:
            if name not in option_names:
                raise UserError(f"{name}: no such decoding option{did_you_mean(name, option_names)}")
        try:
            self.options = model.override_options(**decoding)
        except ValueError as error:
            raise UserError(str(error)) from None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str | None = None, dtype: Precision = "float32", **decoding
    ) -> "Pix2Seq":
        """Loads a model from a folder or from the Hugging Face hub.

        Args:
            name: Folder, such as `runs/NAME/best`, or hub name.
            device: See the class.
            dtype: See the class.
            **decoding: See the class.

        Raises:
            UserError: The model cannot be loaded, or an argument is not valid.
        """
        return cls(load_model(name, "model"), device=device, dtype=dtype, **decoding)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, by label."""
        return self.model.config.class_names

    def labels_of(self, classes: str | Sequence[str] | None) -> list[int]:
        """Returns the labels of classes by their names. Raises UserError for a name that is not a class."""
        names = [classes] if isinstance(classes, str) else classes or ()
        for name in names:
            if name not in self.class_names:
                hint = did_you_mean(str(name), self.class_names) or f"; its classes are {join_names(self.class_names)}"
                raise UserError(f"classes {name}: not a class of the model{hint}")
        return [label for label, name in enumerate(self.class_names) if name in names]

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource],
        threshold: float = 0.5,
        classes: str | Sequence[str] | None = None,
        batch_size: int = 8,
    ) -> DetectionResult | list[DetectionResult]:
        """Detects the objects in an image or in a list of images.

        Args:
            images: Path, PIL image, uint8 RGB array (H, W, 3), or a list of these.
            threshold: Only objects with a higher score are returned; in [0, 1].
            classes: Only objects of these classes are returned. Default: all classes.
            batch_size: Images per forward pass.

        Returns:
            A result, or a list of results if `images` is a list.

        Raises:
            BadImageError: An image cannot be read.
            UserError: An argument is not valid.
        """
        sources: Sequence = images if isinstance(images, list | tuple) else [images]
        results = list(self.stream(sources, threshold, classes, batch_size))
        for result in results:
            if result.error:
                raise BadImageError("unreadable-file", result.error)
        return results if sources is images else results[0]

    def stream(
        self,
        images: Sequence[ImageSource],
        threshold: float = 0.5,
        classes: str | Sequence[str] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> Iterator[DetectionResult]:
        """Yields the result of one image after the other.

        Args:
            images: See `__call__`.
            threshold: See `__call__`.
            classes: See `__call__`.
            batch_size: See `__call__`.
            num_workers: Processes that read images.

        Yields:
            One result per image. The result of an image that cannot be read has an `error` and no objects.

        Raises:
            UserError: An argument is not valid.
        """
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size {batch_size}, num_workers {num_workers}: must be at least 1 and 0")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold {threshold}: must be 0 to 1")
        config, wanted_labels = self.model.config, self.labels_of(classes)
        dataset = EvalDataset(ImageList(images), EvalTransform(config.image_size))
        loader = eval_loader(dataset, batch_size, rank=0, world_size=1, num_workers=num_workers)
        for batch in loader:
            indices, sizes = batch["image_id"].tolist(), batch["original_size"].tolist()
            try:
                with self._autocast():
                    batch_detections = self.model.detect(batch["pixel_values"].to(self.device), self.options)
            except NonFiniteLogits as error:
                names = ", ".join(dataset.annotations.name(indices[row]) for row in error.rows)
                raise RuntimeError(f"{names}: the model's logits are NaN or infinite") from None
            for row, detections in enumerate(batch_detections):
                message, size = batch["unreadable"][row], tuple(sizes[row])
                keep = detections.scores > threshold
                if classes:
                    keep &= np.isin(detections.labels, wanted_labels)
                if message:
                    keep[:] = False
                order = np.argsort(-detections.scores, kind="stable")
                order = order[keep[order]]
                boxes = to_original_pixels(detections.boxes, config.image_size, batch["size"][row].tolist(), size)
                yield DetectionResult(
                    source=images[indices[row]],
                    size=size,
                    boxes=boxes[order],
                    labels=detections.labels[order],
                    scores=detections.scores[order],
                    names=[self.class_names[label] for label in detections.labels[order]],
                    error=message,
                )

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.dtype))


def _usable_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Boxes need float64, which Apple's GPUs do not support.
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except Exception as error:  # each backend raises other exceptions
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"device {name}: cannot be used; use cpu, cuda, cuda:1, ... ({reason})") from None
    return torch.device(name)
