"""Image size, object slots and coordinate bins that suit a dataset."""

import numpy as np

from pix2seq.data.coco import Annotations

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE, IMAGE_SIZE_STEP = 256, 640, 32
SMALL_OBJECT_SHARE, MIN_OBJECT_SIDE = 0.05, 20.0
MAX_OBJECTS_STEP, MAX_NUM_BINS = 5, 1000


def recommended_sizes(annotations: Annotations, image_size: int = 0) -> dict[str, int]:
    """Derives sizes from the annotations of the training images.

    - `image_size`: the smallest multiple of 32 from 256 to 640 at which 19 of 20 objects have a side (the square root
      of their area) of at least 20 pixels, somewhat more than the stride of many feature maps.
    - `num_bins`: one bin per pixel, at most 1000.
    - `max_objects`: the largest number of objects in an image, rounded up to a multiple of 5.

    Args:
        annotations: The training images.
        image_size: The image size, if it is known.

    Returns:
        The sizes, by the name of their flag.
    """
    counts = np.diff(annotations.offsets)
    image_of_object = np.repeat(np.arange(len(annotations)), counts)[annotations.trainable]
    boxes, longest = annotations.boxes[annotations.trainable], annotations.sizes.max(axis=1)[image_of_object]
    num_objects = max(1, np.bincount(image_of_object, minlength=1).max())
    has_size = longest > 0
    sides = np.sqrt(np.prod(boxes[has_size, 2:] - boxes[has_size, :2], axis=1)) / longest[has_size]
    small = np.quantile(sides, SMALL_OBJECT_SHARE) if len(sides) else 1.0
    steps = np.ceil(MIN_OBJECT_SIDE / max(small, 1e-9) / IMAGE_SIZE_STEP)
    image_size = image_size or int(np.clip(IMAGE_SIZE_STEP * steps, MIN_IMAGE_SIZE, MAX_IMAGE_SIZE))
    return {
        "image_size": image_size,
        "num_bins": min(image_size, MAX_NUM_BINS),
        "max_objects": int(-(-num_objects // MAX_OBJECTS_STEP) * MAX_OBJECTS_STEP),
    }
