"""Image processor of Pix2Seq models, with the interface of the DETR image processor of transformers."""

from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import SizeDict, load_image

from pix2seq.sequence import SequenceBuilder
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform, PaddedImage, from_pil, resized_size, to_original_pixels

# What transformers writes to preprocessor_config.json in addition to the arguments.
SAVED_ATTRIBUTES = {"auto_map", "image_processor_type", "processor_class", "rescale_factor"}


class Pix2SeqImageProcessorKwargs(TypedDict, total=False):
    """Keyword arguments of `Pix2SeqImageProcessor`, which describes them, and of a call."""

    size: dict[str, int] | int | None
    do_convert_rgb: bool | None
    do_resize: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    image_mean: list[float] | tuple[float, ...] | None
    image_std: list[float] | tuple[float, ...] | None
    input_data_format: str | None
    device: Any
    return_tensors: str | None
    category_ids: list[int] | tuple[int, ...] | None
    num_bins: int | None
    max_objects: int | None
    noise_objects: bool | None
    labels_format: str | None


class Pix2SeqImageProcessor(TorchvisionBackend):
    """Resizes images to fit into a square and pads them at the right and the bottom.

    Pixels remain uint8, and the model normalizes them on its device, unless `do_normalize` is given. Images of paths
    and URLs are rotated by their EXIF orientation; loaded images are used as they are.

    Args:
        size: Side S of the padded image, in pixels: an int, or `{"height": S, "width": S}`.
        do_convert_rgb: Must be True: the model processes RGB images.
        do_resize: Whether to resize images. If not, they must fit into the square.
        do_rescale: Must be equal to `do_normalize` if it is given.
        do_normalize: Whether to scale pixels to [0, 1] and normalize them.
        image_mean: Mean for the normalization of RGB pixels in [0, 1].
        image_std: Standard deviation for the normalization of RGB pixels in [0, 1].
        category_ids: Category id in COCO annotations of each label.
        num_bins: Number of bins of a coordinate, see `Tokenizer`.
        max_objects: Number of object slots, see `SequenceBuilder`.
        noise_objects: Whether noise objects fill the slots, see `SequenceBuilder`.
        image_size: The same as `size`.
    """

    model_input_names: ClassVar = ["pixel_values"]
    valid_kwargs = Pix2SeqImageProcessorKwargs
    size: Any = {"height": 640, "width": 640}  # noqa: RUF012
    do_convert_rgb = True
    do_resize = True
    do_normalize = False
    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    return_tensors = "pt"
    category_ids: list[int] | tuple[int, ...] = (0,)
    num_bins = 1000
    max_objects = 100
    noise_objects = True
    labels_format: Literal["tokens", "boxes"] = "tokens"

    def __init__(self, image_size: int | None = None, **kwargs):
        unknown = set(kwargs) - set(self.valid_kwargs.__annotations__) - SAVED_ATTRIBUTES
        if unknown := {name for name in unknown if not name.startswith("_")}:
            raise TypeError(f"unexpected keyword arguments {', '.join(sorted(unknown))}")
        super().__init__(**kwargs if image_size is None else kwargs | {"size": image_size})
        self.category_ids = list(self.category_ids)

    @classmethod
    def from_model_config(cls, config) -> "Pix2SeqImageProcessor":
        """Returns the processor of a model, by its `Pix2SeqConfig`."""
        names = (
            "image_size",
            "image_mean",
            "image_std",
            "category_ids",
            "num_bins",
            "max_objects",
            "noise_objects",
        )
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def image_size(self) -> int:
        """Side S of the padded image, in pixels."""
        return self.size["height"]

    @image_size.setter
    def image_size(self, side: int) -> None:
        self.size = SizeDict(height=side, width=side)

    def preprocess(self, images, annotations=None, **kwargs) -> BatchFeature:
        """Prepares images and, optionally, annotations for the model.

        Args:
            images: An image, a batch of images (B, 3, H, W) or (B, H, W, 3), or a list of images. An image is a PIL
                image, a path, a URL, or a uint8 array or tensor, (H, W, 3), (3, H, W) or (H, W).
            annotations: For each image, a dict in COCO format:
                `{"image_id", "annotations": [{"bbox", "category_id", "iscrowd"}]}`, boxes xywh in pixels of the image.
                Crowds and boxes without area are ignored.
            kwargs: The arguments of the class; for this call, they replace the values of the processor. Also:

                - `return_tensors`: "pt" (default), "np", or None for lists.
                - `labels_format`: "tokens" (default), or "boxes" for labels as those of the DETR image processor.
                - `do_resize`: If given here, also give it to `post_process_object_detection`.
                - `device`: Device of `pixel_values`.
                - `input_data_format`: "channels_first" or "channels_last" for arrays. Default: by the shape.

        Returns:
            `pixel_values`, uint8 or normalized float32 (B, 3, S, S). With annotations also `input_ids`, `labels` and
            `token_weights`, each (B, L), for a loss without augmentation. With `labels_format="boxes"`, instead a dict
            for each image in `labels`: `class_labels` (M,), `boxes` (M, 4), cxcywh in [0, 1] of the padded square,
            `image_id`, and the (height, width) in pixels of the image in the square (`size`) and before (`orig_size`).

        Raises:
            TypeError: A keyword argument is unknown.
            ValueError: An argument is not supported, or images and annotations do not match.
        """
        if unknown := set(kwargs) - set(self.valid_kwargs.__annotations__):
            raise TypeError(
                f"unexpected keyword arguments {', '.join(sorted(unknown))}: the image processor accepts "
                f"{', '.join(self.valid_kwargs.__annotations__)}"
            )
        if {"image_mean", "image_std"} & set(kwargs) and not kwargs.get("do_normalize", self.do_normalize):
            raise ValueError(
                "image_mean and image_std need do_normalize=True: otherwise the model normalizes the pixels"
            )
        return super().preprocess(images, annotations, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs | {"default_to_square": True})
        size = kwargs["size"]
        if not size.height or size.height != size.width:
            raise ValueError(f"size is {dict(size)}: an int, or height and width of the same value, is needed")
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        do_normalize = kwargs["do_normalize"]
        if not kwargs["do_convert_rgb"]:
            raise ValueError("do_convert_rgb is False: the model processes RGB images only")
        if kwargs["do_rescale"] not in (None, do_normalize):
            raise ValueError(
                f"do_rescale is {kwargs['do_rescale']}, but do_normalize is {do_normalize}: the model needs uint8 or "
                "normalized pixels"
            )
        if kwargs["labels_format"] not in ("tokens", "boxes"):
            raise ValueError(f"labels_format is {kwargs['labels_format']!r}: must be 'tokens' or 'boxes'")

    def fetch_images(self, image_url_or_urls):
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str | Path):
            try:
                return load_image(str(image_url_or_urls))
            except ValueError:
                raise ValueError(f"{str(image_url_or_urls)[:200]}: no such image file or URL") from None
        is_grayscale = getattr(image_url_or_urls, "ndim", 3) == 2
        return image_url_or_urls[None] if is_grayscale else image_url_or_urls

    def process_image(self, image, input_data_format: str | None = None, **kwargs) -> torch.Tensor:
        """Converts an image to uint8 RGB (3, H, W). The arguments are those of transformers.

        Raises:
            ValueError: It is not a PIL image or a uint8 array or tensor with one, three or four channels.
        """
        if isinstance(image, Image.Image):
            return from_pil(image)
        dtype, shape = getattr(image, "dtype", None), tuple(getattr(image, "shape", ()))
        if dtype not in (torch.uint8, np.uint8) or len(shape) not in (2, 3):
            raise ValueError(
                f"an image of shape {shape} and type {dtype or type(image).__name__}: expected a PIL image, a path, a "
                "URL, or uint8 of shape (H, W, 3), (3, H, W) or (H, W)"
            )
        return super().process_image(image, do_convert_rgb=True, input_data_format=input_data_format)

    def _preprocess_image_like_inputs(self, images, annotations=None, **kwargs) -> BatchFeature:
        images = self._prepare_image_like_inputs(images, input_data_format=kwargs["input_data_format"])
        if not images:
            raise ValueError("there are no images")
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"{len(images)} images, but annotations of {len(annotations)}")
        side = kwargs["size"].height
        transform = EvalTransform(side, resize=kwargs["do_resize"])
        build_sequence = SequenceBuilder(
            Tokenizer(len(kwargs["category_ids"]), kwargs["num_bins"]),
            max_objects=kwargs["max_objects"],
            noise_objects=kwargs["noise_objects"],
            order="none",
            class_corruption="none",
        )
        examples, box_labels = [], []
        for index, image in enumerate(images):
            if annotations is None:
                examples.append({"pixel_values": transform(image).image})
                continue
            boxes, labels = read_annotation(annotations[index], kwargs["category_ids"])
            padded = transform(image, boxes)
            labels = labels[padded.kept]
            example = {"pixel_values": padded.image}
            if kwargs["labels_format"] == "boxes":
                label = detr_label(padded, labels, annotations[index].get("image_id"), tuple(image.shape[-2:]))
                box_labels.append(BatchFeature(label, tensor_type=kwargs["return_tensors"]))
            else:
                sequence = build_sequence(padded.boxes, labels, np.random.default_rng(0), padded.valid_fraction)
                example |= {name: torch.as_tensor(values) for name, values in sequence.items()}
            examples.append(example)
        data = {name: [example[name] for example in examples] for name in examples[0]}
        pixel_values = torch.stack(data["pixel_values"])
        if kwargs["do_normalize"]:
            mean, std = kwargs["image_mean"], kwargs["image_std"]
            pixel_values = self.rescale_and_normalize(pixel_values, True, self.rescale_factor, True, mean, std)
        data["pixel_values"] = list(pixel_values.to(kwargs["device"] or pixel_values.device))
        batch = BatchFeature(data, tensor_type=kwargs["return_tensors"])
        if box_labels:
            batch["labels"] = box_labels
        return batch

    def post_process_object_detection(
        self,
        outputs,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | list[tuple] | None = None,
        do_resize: bool | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Converts the output of the model to the detections of each image.

        Args:
            outputs: A `Pix2SeqOutput` of a call with `pixel_values` only.
            threshold: Detections with a higher score are returned. The model predicts an object in each of its slots,
                most of them with a score near 0.
            target_sizes: The (height, width) of each original image, in pixels.
            do_resize: The `do_resize` of the call that prepared the images, if it was given.

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
        do_resize, results = self.do_resize if do_resize is None else do_resize, []
        for index, (boxes, labels, scores) in enumerate(
            zip(outputs.pred_boxes, outputs.pred_labels, outputs.pred_scores, strict=True)
        ):
            keep = (scores > threshold) & (labels >= 0)
            boxes = boxes[keep]
            if target_sizes is not None:
                height, width = (int(length) for length in target_sizes[index])
                size = height, width
                valid_size = resized_size(size, self.image_size) if do_resize else size
                pixels = to_original_pixels(boxes.cpu().numpy(), self.image_size, valid_size, size)
                boxes = torch.from_numpy(pixels).to(boxes.device)
            results.append({"scores": scores[keep], "labels": labels[keep], "boxes": boxes})
        return results


def read_annotation(annotation: dict, category_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the boxes (M, 4), xyxy in pixels, and the labels (M,) of an annotation in COCO format.

    Raises:
        ValueError: The category of an object is not one of `category_ids`, or a box is not finite.
    """
    if "annotations" not in annotation:
        raise ValueError(f"an annotation lacks 'annotations', the list of objects; found {', '.join(annotation)}")
    for o in annotation["annotations"]:
        if not np.isfinite(o["bbox"]).all():
            raise ValueError(f"the box {o['bbox']} of image {annotation.get('image_id')} is not finite")
    objects = [o for o in annotation["annotations"] if not o.get("iscrowd") and min(o["bbox"][2:]) > 0]
    for o in objects:
        if o["category_id"] not in category_ids:
            raise ValueError(f"category {o['category_id']} is not one of {category_ids}")
    boxes = np.array([o["bbox"] for o in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, np.array([category_ids.index(o["category_id"]) for o in objects], dtype=np.int64)


def detr_label(padded: PaddedImage, labels: np.ndarray, image_id, size: tuple[int, int]) -> dict[str, Any]:
    """Returns the objects of an image as the DETR image processor does, see `Pix2SeqImageProcessor.preprocess`.

    Args:
        padded: The padded image and its M boxes.
        labels: Labels (M,).
        image_id: Id of the image.
        size: The (height, width) of the original image, in pixels.
    """
    corners = padded.boxes
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    return {
        "class_labels": labels,
        "boxes": boxes.astype(np.float32),
        **({} if image_id is None else {"image_id": np.array([image_id])}),
        "size": np.array(padded.valid_size),
        "orig_size": np.array(size),
    }
