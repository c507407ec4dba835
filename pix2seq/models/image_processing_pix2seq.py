"""Image processor of Pix2Seq models, with the interface of the DETR image processor of transformers."""

from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform, from_pil, resized_size, to_original_pixels


class Pix2SeqImageProcessor(BaseImageProcessor):
    """Resizes images to fit into a square and pads them at the right and the bottom.

    Pixels remain uint8: the model normalizes them on its device. The EXIF orientation is not applied; load photos with
    `PIL.ImageOps.exif_transpose`, as pipelines do.

    Args:
        image_size: Side S of the padded image, in pixels.
        category_ids: Category id in COCO annotations of each label.
        num_bins: Number of bins of a coordinate, see `Tokenizer`.
        max_objects: Number of object slots, see `SequenceBuilder`.
        noise_objects: Whether noise objects fill the slots, see `SequenceBuilder`.
    """

    model_input_names: ClassVar = ["pixel_values"]

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
    def from_model_config(cls, config) -> "Pix2SeqImageProcessor":
        """Returns the processor of a model, by its `Pix2SeqConfig`."""
        names = ("image_size", "category_ids", "num_bins", "max_objects", "noise_objects")
        return cls(**{name: getattr(config, name) for name in names})

    def preprocess(self, images, annotations=None, return_tensors: str = "pt", **kwargs) -> BatchFeature:
        """Prepares images and, optionally, annotations for the model.

        Args:
            images: An image or a list of B images: PIL, or uint8 arrays or tensors, (H, W, 3) or (3, H, W).
            annotations: For each image, a dict in COCO format:
                `{"image_id", "annotations": [{"bbox", "category_id", "iscrowd"}]}`, boxes xywh in pixels of the image.
                Crowds and boxes without area are ignored.
            return_tensors: Must be "pt".

        Returns:
            `pixel_values`, uint8 (B, 3, S, S). With annotations also `input_ids`, `labels` and `token_weights`, each
            (B, L), for a loss without augmentation.

        Raises:
            ValueError: An argument is not supported, or images and annotations do not match.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}: only 'pt' is supported")
        images = images if isinstance(images, list | tuple) else [images]
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"{len(images)} images, but annotations of {len(annotations)}")
        transform = EvalTransform(self.image_size)
        examples = []
        for index, image in enumerate(images):
            if annotations is None:
                examples.append({"pixel_values": transform(to_rgb_tensor(image)).image})
                continue
            boxes, labels = self._prepare_annotation(annotations[index])
            padded = transform(to_rgb_tensor(image), boxes)
            sequence = self._sequence_builder()(
                padded.boxes, labels[padded.kept], np.random.default_rng(0), padded.valid_fraction
            )
            tensors = {name: torch.as_tensor(values) for name, values in sequence.items()}
            examples.append({"pixel_values": padded.image} | tensors)
        names = examples[0] if examples else ()
        return BatchFeature({name: torch.stack([example[name] for example in examples]) for name in names})

    def post_process_object_detection(
        self, outputs, threshold: float = 0.5, target_sizes: torch.Tensor | list[tuple] | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Converts the output of the model to the detections of each image.

        Args:
            outputs: A `Pix2SeqOutput` of a call with `pixel_values` only.
            threshold: Detections with a higher score are returned. The model predicts an object in each of its slots,
                most of them with a score near 0.
            target_sizes: The (height, width) of each original image, in pixels.

        Returns:
            For each image, `scores` (N,), `labels` (N,) and `boxes` (N, 4), best score first. Boxes are xyxy in pixels
            of the original image, clipped to it; without `target_sizes`, xyxy in [0, 1] of the padded image.

        Raises:
            ValueError: `outputs` contains no boxes, or the number of `target_sizes` is not the number of images.
        """
        if outputs.pred_boxes is None:
            raise ValueError("outputs contain no boxes: call the model with pixel_values only")
        if target_sizes is not None and len(target_sizes) != len(outputs.pred_boxes):
            raise ValueError(f"{len(target_sizes)} target_sizes, but {len(outputs.pred_boxes)} images")
        results = []
        for index, (boxes, labels, scores) in enumerate(
            zip(outputs.pred_boxes, outputs.pred_labels, outputs.pred_scores, strict=True)
        ):
            keep = (scores > threshold) & (labels >= 0)
            boxes = boxes[keep]
            if target_sizes is not None:
                height, width = (int(length) for length in target_sizes[index])
                size = height, width
                valid_size = resized_size(size, self.image_size)
                pixels = to_original_pixels(boxes.cpu().numpy(), self.image_size, valid_size, size)
                boxes = torch.from_numpy(pixels).to(boxes.device)
            results.append({"scores": scores[keep], "labels": labels[keep], "boxes": boxes})
        return results

    def _prepare_annotation(self, annotation: dict) -> tuple[np.ndarray, np.ndarray]:
        objects = [o for o in annotation["annotations"] if not o.get("iscrowd") and min(o["bbox"][2:]) > 0]
        for o in objects:
            if o["category_id"] not in self.category_ids:
                raise ValueError(f"category {o['category_id']} is not one of {self.category_ids}")
        boxes = np.array([o["bbox"] for o in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.array([self.category_ids.index(o["category_id"]) for o in objects], dtype=np.int64)

    def _sequence_builder(self) -> SequenceBuilder:
        return SequenceBuilder(
            Tokenizer(len(self.category_ids), self.num_bins),
            max_objects=self.max_objects,
            noise_objects=self.noise_objects,
            order="none",
            class_corruption="none",
        )


def to_rgb_tensor(image) -> torch.Tensor:
    """Converts an image to uint8 RGB (3, H, W).

    Raises:
        ValueError: It is not a PIL image or a uint8 array or tensor with three channels.
    """
    if isinstance(image, Image.Image):
        return from_pil(image)
    tensor = torch.as_tensor(image)
    if tensor.ndim == 3 and tensor.shape[0] != 3 and tensor.shape[-1] == 3:
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] != 3 or tensor.dtype != torch.uint8:
        raise ValueError(
            f"an image of shape {tuple(tensor.shape)} and type {tensor.dtype}: expected a PIL image, or uint8 "
            "of shape (H, W, 3) or (3, H, W)"
        )
    return tensor
