"""Hard negatives: false detections in training images, which become noise objects of the training sequences.

The random boxes of noise objects (Pix2Seq section 2.3) rarely contain what the model confuses with an object, for
example an object without annotation. Its own false detections do (hard example mining, see 1604.03540).
"""

import torch
from torchvision.ops import box_convert, box_iou

from pix2seq.data import Annotations

MAX_IMAGES = 1000  # of one search; later ones continue with the next images
MIN_SCORE = 0.02  # the model already rejects detections that score lower
MAX_IOU = 0.5  # with an object of any class, from which on a detection is not a hard negative


def images_to_search(num_images: int, search: int) -> list[int]:
    """Returns the indices of the images of a search, at most `MAX_IMAGES`.

    Args:
        num_images: Number of training images.
        search: Number of searches before this one.
    """
    first = search * MAX_IMAGES
    return [index % num_images for index in range(first, first + min(num_images, MAX_IMAGES))]


def select_hard_negatives(predictions: list[dict], annotations: Annotations) -> dict[int, torch.Tensor]:
    """Selects the detections that overlap no object, including crowds, and are not rejected by their score.

    Args:
        predictions: COCO results of all images of `annotations`, with boxes in pixels.
        annotations: The images and their objects.

    Returns:
        Boxes (K, 4), float32, xyxy in pixels, by image id. K is 0 for images without hard negatives.
    """
    detected: dict[int, list] = {image_id: [] for image_id in annotations.image_ids.tolist()}
    for entry in predictions:
        if entry["score"] >= MIN_SCORE:
            detected[entry["image_id"]].append(entry["bbox"])
    negatives = {}
    for index, (image_id, boxes) in enumerate(detected.items()):
        candidates = box_convert(torch.tensor(boxes).reshape(-1, 4), "xywh", "xyxy")
        objects = slice(annotations.offsets[index], annotations.offsets[index + 1])
        annotated, crowd = torch.from_numpy(annotations.boxes[objects]), annotations.crowd[objects]
        overlaps = (box_iou(candidates, annotated[~crowd]) >= MAX_IOU).any(dim=1)
        # A crowd contains objects that are not annotated one by one: any overlap counts.
        overlaps |= (box_iou(candidates, annotated[crowd]) > 0).any(dim=1)
        negatives[image_id] = candidates[~overlaps]
    return negatives
