import json

import numpy as np
import pytest
from PIL import Image

from pix2seq.data import find_split, load_annotations, recommended_sizes
from pix2seq.plan import PlanArguments, plan


def write_dataset(root, boxes_of_images, size=(640, 480)):
    for split in ("train", "val"):
        (root / f"images/{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    annotations = [
        {"id": 10 * image + number, "image_id": image, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0}
        for image, boxes in enumerate(boxes_of_images)
        for number, box in enumerate(boxes)
    ]
    images = [
        {"id": image, "file_name": f"{image}.png", "width": size[0], "height": size[1]}
        for image in range(len(boxes_of_images))
    ]
    for image in images:
        Image.new("L", size).save(root / "images/train2017" / str(image["file_name"]))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    for split in ("train", "val"):
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return load_annotations(find_split("train", root, None, None, None), None, False)


@pytest.mark.parametrize(
    ("side", "image_size"),
    [
        (300, 256),  # large objects
        (50, 256),  # exactly 20 pixels at 256
        (40, 320),
        (4, 640),  # at most 640
    ],
)
def test_the_image_size_follows_from_the_size_of_the_objects(tmp_path, side, image_size):
    sizes = recommended_sizes(write_dataset(tmp_path, [[[0, 0, side, side]] * 3, [[5, 5, side, side]]]))
    assert sizes == {"image_size": image_size, "num_bins": image_size, "max_objects": 5}


def test_a_few_small_objects_do_not_matter(tmp_path):
    annotations = write_dataset(tmp_path, [[[0, 0, 100, 100]] * 39 + [[0, 0, 4, 4]]])
    assert recommended_sizes(annotations)["image_size"] == 256


def test_the_number_of_slots_is_that_of_the_fullest_image(tmp_path):
    annotations = write_dataset(tmp_path, [[[0, 0, 50, 50]] * count for count in (1, 11, 3)])
    assert recommended_sizes(annotations)["max_objects"] == 15


def test_boxes_without_area_do_not_count(tmp_path):
    annotations = write_dataset(tmp_path, [[[0, 0, 50, 50]] + [[0, 0, 0, 0]] * 8])
    assert recommended_sizes(annotations) == {"image_size": 256, "num_bins": 256, "max_objects": 5}


def test_a_given_image_size_determines_the_bins(tmp_path):
    annotations = write_dataset(tmp_path, [[[0, 0, 50, 50]]])
    assert recommended_sizes(annotations, 480)["num_bins"] == 480


def test_a_dataset_without_objects(tmp_path):
    sizes = recommended_sizes(write_dataset(tmp_path, [[], []]))
    assert sizes == {"image_size": 256, "num_bins": 256, "max_objects": 5}


def test_images_of_unknown_size(tmp_path):
    annotations = write_dataset(tmp_path, [[[0, 0, 50, 50]]])
    annotations.sizes = np.zeros_like(annotations.sizes)
    assert recommended_sizes(annotations)["image_size"] == 256


def test_plan_uses_the_sizes_of_the_dataset(tmp_path):
    write_dataset(tmp_path, [[[0, 0, 40, 40]] * 7])
    tiny = {"backbone": "{model_type: resnet, depths: [1], hidden_sizes: [8], embedding_size: 8, layer_type: basic}"}
    args = PlanArguments(root=str(tmp_path), image_size=0, num_bins=0, max_objects=0, **tiny)
    assert plan(args)["sequence_tokens_per_image"] == 5 * 10
    assert (args.image_size, args.num_bins) == (320, 320)
