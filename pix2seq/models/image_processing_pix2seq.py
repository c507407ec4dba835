"""From pictures to what the detector takes, and from what it says to boxes, as Hugging Face pipelines ask for it."""

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform, from_pil, resized_size, to_original_pixels


class Pix2SeqImageProcessor(BaseImageProcessor):
    """Fits pictures into the square canvas. Pixels stay uint8: the detector normalises them itself, on its device.
    Pictures are taken as they are stored: who loads a photo turns it as its EXIF tag says, as pipelines do.

    image_size      side of the canvas
    category_ids    original id of each label, for COCO annotations
    num_bins, max_objects, noise_objects   how sentences are built: see Tokenizer and SequenceBuilder
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 640,
        category_ids: tuple[int, ...] = (0,),
        num_bins: int = 1000,
        max_objects: int = 100,
        noise_objects: bool = True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.category_ids = list(category_ids)
        self.num_bins = num_bins
        self.max_objects = max_objects
        self.noise_objects = noise_objects

    @classmethod
    def for_detector(cls, config) -> "Pix2SeqImageProcessor":
        """The processor that belongs to a detector, by its Pix2SeqConfig."""
        names = ("image_size", "category_ids", "num_bins", "max_objects", "noise_objects")
        return cls(**{name: getattr(config, name) for name in names})

    def __call__(self, images, annotations=None, return_tensors: str = "pt", **kwargs) -> BatchFeature:
        return self.preprocess(images, annotations, return_tensors, **kwargs)

    def preprocess(self, images, annotations=None, return_tensors: str = "pt", **kwargs) -> BatchFeature:
        """pixel_values uint8 (B, 3, S, S) of a picture or a list of them: PIL, or uint8 arrays and tensors, (H, W, 3)
        or (3, H, W).

        With `annotations`, a {"image_id", "annotations": [{"bbox", "category_id", "iscrowd"}]} for each picture as in
        COCO files (xywh in its pixels): also input_ids, labels and weights (B, L), for a loss without augmentation.
        Crowds and boxes without area are left out. Raises ValueError.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}: only 'pt' is offered")
        images = images if isinstance(images, list | tuple) else [images]
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"{len(images)} images, but annotations of {len(annotations)}")
        features: dict[str, list] = {}
        for index, image in enumerate(images):
            boxes, labels = self._objects(annotations[index]) if annotations is not None else (np.zeros((0, 4)), None)
            canvas = EvalTransform(self.image_size)(as_tensor(image), boxes)
            row = {"pixel_values": canvas.image}
            if annotations is not None:
                sentence = self._builder()(
                    canvas.boxes, labels[canvas.kept], np.random.default_rng(0), canvas.valid_fraction
                )
                row |= {name: torch.as_tensor(values) for name, values in sentence.items()}
            for name, value in row.items():
                features.setdefault(name, []).append(value)
        return BatchFeature({name: torch.stack(values) for name, values in features.items()})

    def post_process_object_detection(
        self, outputs, threshold: float = 0.5, target_sizes: torch.Tensor | list[tuple] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """The detector's output -> for each picture scores (N,), labels (N,) and boxes (N, 4), best first.

        target_sizes   (height, width) of each original picture; boxes are xyxy in its pixels, clipped to it. Without
                       them, xyxy in [0, 1] of the canvas.
        Only scores above `threshold`: a detector writes an object into each of its slots, most of them with scores
        near 0. Raises ValueError if there are not as many sizes as pictures.
        """
        if outputs.pred_boxes is None:
            raise ValueError("outputs hold no boxes: call the detector with pixel_values alone")
        if target_sizes is not None and len(target_sizes) != len(outputs.pred_boxes):
            raise ValueError(f"{len(target_sizes)} target_sizes, but {len(outputs.pred_boxes)} pictures")
        found = []
        for row, (boxes, labels, scores) in enumerate(
            zip(outputs.pred_boxes, outputs.pred_labels, outputs.pred_scores, strict=True)
        ):
            kept = (scores > threshold) & (labels >= 0)
            boxes = boxes[kept]
            if target_sizes is not None:
                size = tuple(int(length) for length in target_sizes[row])
                covered = resized_size(size, self.image_size)
                pixels = to_original_pixels(boxes.cpu().numpy(), self.image_size, covered, size)
                boxes = torch.from_numpy(pixels).to(boxes.device)
            found.append({"scores": scores[kept], "labels": labels[kept], "boxes": boxes})
        return found

    def _objects(self, annotation: dict) -> tuple[np.ndarray, np.ndarray]:
        rows = [row for row in annotation["annotations"] if not row.get("iscrowd") and min(row["bbox"][2:]) > 0]
        for row in rows:
            if row["category_id"] not in self.category_ids:
                raise ValueError(f"category {row['category_id']} is not one of {self.category_ids}")
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.array([self.category_ids.index(row["category_id"]) for row in rows], dtype=np.int64)

    def _builder(self) -> SequenceBuilder:
        tokenizer = Tokenizer(len(self.category_ids), self.num_bins)
        return SequenceBuilder(
            tokenizer,
            max_objects=self.max_objects,
            noise_objects=self.noise_objects,
            order="none",
            class_corruption="none",
        )


def as_tensor(image) -> torch.Tensor:
    """A picture as uint8 RGB (3, H, W). Raises ValueError if it is none."""
    if isinstance(image, Image.Image):
        return from_pil(image)
    tensor = torch.as_tensor(image)
    if tensor.ndim == 3 and tensor.shape[0] != 3 and tensor.shape[-1] == 3:
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] != 3 or tensor.dtype != torch.uint8:
        raise ValueError(
            f"an image of shape {tuple(tensor.shape)} and type {tensor.dtype}: PIL, or uint8 (H, W, 3) or (3, H, W)"
        )
    return tensor
