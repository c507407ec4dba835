"""COCO annotation files: classes, objects, layouts, and the issues of invalid entries and files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pix2seq.data import Categories, Split, find_split, load_annotations
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import load_ground_truth

# Sparse ids, not in order, and unusual names.
CATEGORIES = [
    {"id": 90, "name": "hair drier"},
    {"id": 3, "name": "Zuerich, 'old'"},
    {"id": 17, "name": "3"},
]


def content() -> dict:
    """Three images of 20 x 10 pixels: with various objects, without objects, with two objects of one class."""
    return {
        "images": [
            {"id": 700, "file_name": "b.png", "width": 20, "height": 10},
            {"id": 5, "file_name": "a.png", "width": 20, "height": 10},
            {"id": 42, "file_name": "c.png", "width": 20, "height": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 2, "image_id": 700, "category_id": 90, "bbox": [0.5, 0.25, 2.5, 3], "iscrowd": 0},
            {"id": 3, "image_id": 700, "category_id": 17, "bbox": [0, 0, 20, 10], "iscrowd": 1},
            {"id": 4, "image_id": 700, "category_id": 17, "bbox": [4, 4, 0, 5], "iscrowd": 0},
            {"id": 5, "image_id": 700, "category_id": 17, "bbox": [4, 4, 5, -1], "iscrowd": 0},
            {"id": 6, "image_id": 42, "category_id": 3, "bbox": [5, 5, 1, 1]},
        ],
        "categories": [dict(category) for category in CATEGORIES],
    }


def edited(path: str, value) -> dict:
    """Returns content() with another value at a path such as annotations.1.bbox."""
    document = content()
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    parent = document
    for key in parents:
        parent = parent[key]
    parent[last] = value
    return document


def write(folder: Path, value) -> Split:
    """Writes three images and an annotation file."""
    split = Split(folder / "images", folder / "instances.json")
    split.images.mkdir(exist_ok=True)
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (20, 10)).save(split.images / name)
    split.json.write_text(value if isinstance(value, str) else json.dumps(value))
    return split


def user_error(call, *args) -> str:
    """Returns the message of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


# -- valid files -----------------------------------------------------------------------------------


def test_objects_have_contiguous_labels_and_xyxy_boxes(tmp_path):
    split = write(tmp_path, content())
    annotations = load_annotations(split)
    assert annotations.categories == Categories((3, 17, 90), ("Zuerich, 'old'", "3", "hair drier"))
    assert annotations.image_ids.tolist() == [700, 5, 42]
    assert annotations.name(1) == f"{split.images}/a.png"
    objects = [annotations.objects(index) for index in range(3)]
    assert [labels.tolist() for _, labels in objects] == [[2], [], [0, 0]]
    assert [boxes.tolist() for boxes, _ in objects] == [[[0.5, 0.25, 3.0, 3.25]], [], [[1, 2, 4, 6], [5, 5, 6, 6]]]
    assert {(boxes.dtype.name, boxes.shape[1]) for boxes, _ in objects} == {("float64", 4)}


def test_crowds_and_boxes_without_area_are_only_used_in_evaluation(tmp_path):
    split = write(tmp_path, content())
    annotations = load_annotations(split)
    assert len(annotations.boxes) == 6
    assert annotations.crowd.sum() == 1
    assert annotations.trainable.sum() == 3
    summary, issues = annotations.summary(max_objects=1)
    assert "1 crowd boxes, 2 boxes without area" in summary
    assert "1 images have more than 1 objects" in summary
    assert "1 zero-size" in issues
    assert "1 negative-size" in issues
    truth = load_ground_truth(split.json)
    assert len(truth["annotations"]) == 6
    assert sum(entry["iscrowd"] for entry in truth["annotations"]) == 1
    assert truth["categories"] == CATEGORIES
    assert json.loads(split.json.read_text()) == content()


def test_a_file_may_have_no_annotations(tmp_path):
    annotations = load_annotations(write(tmp_path, content() | {"annotations": []}))
    assert annotations.objects(2)[0].shape == (0, 4)
    assert "3 images (3 without objects), 0 objects" in annotations.summary(100)[0]


def test_subset_keeps_the_objects_of_its_images(tmp_path):
    annotations = load_annotations(write(tmp_path, content()))
    subset = annotations.subset([2, 1, 0])
    assert subset.image_ids.tolist() == [42, 5, 700]
    assert subset.name(0).endswith("/c.png")
    for new, old in enumerate((2, 1, 0)):
        for values, expected in zip(subset.objects(new), annotations.objects(old), strict=True):
            np.testing.assert_array_equal(values, expected)
    first = annotations.subset([0])
    assert first.categories == annotations.categories
    assert "1 crowd boxes, 2 boxes without area" in first.summary(100)[0]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        *[(10.0, 20.0, [10, 20]), (10, 20, [10, 20]), ("10", 20, [0, 0]), (-10, 20, [0, 0])],
        *[(10.5, 20, [0, 0]), (True, 20, [0, 0]), (2**40, 20, [0, 0]), (float("nan"), 20, [0, 0])],
    ],
)
def test_image_sizes_are_whole_numbers_or_unknown(tmp_path, height, width, expected):
    value = content()
    value["images"][0] |= {"height": height, "width": width}
    assert load_annotations(write(tmp_path, value)).sizes[0].tolist() == expected


# -- layouts ---------------------------------------------------------------------------------------


def test_coco_layouts_are_found(tmp_path, shapes_root):
    split = find_split("train", shapes_root)
    assert split == Split(shapes_root / "images/train2017", shapes_root / "annotations" / "instances_train2017.json")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    (tmp_path / "val2017").mkdir()
    assert find_split("val", tmp_path).images == tmp_path / "val2017"


def test_incomplete_datasets_are_rejected(tmp_path):
    assert "nowhere: no such folder" in user_error(find_split, "val", tmp_path / "nowhere")
    assert "annotations/instances_val2017.json is missing" in user_error(find_split, "val", tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    message = user_error(find_split, "val", tmp_path)
    assert str(tmp_path) in message
    assert "neither images/val2017 nor val2017" in message
    (tmp_path / "images").mkdir()
    (tmp_path / "images/val2017.zip").touch()
    assert "images/val2017.zip is a zip archive; unpack it" in user_error(find_split, "val", tmp_path)


# -- issues of entries -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "kind", "entry", "reason"),
    [
        ("annotations.1.category_id", 4, "unknown-category", "annotation 2", "category 4 is not one of 3, 17, 90"),
        ("annotations.1.category_id", None, "unknown-category", "annotation 2", "category None"),
        ("annotations.5.image_id", 43, "unknown-image", "annotation 6", "image 43"),
        *(
            ("annotations.0.bbox", bbox, "bbox-invalid", "annotation 1", "four finite numbers")
            for bbox in (None, [1, 2, 3], *([1, 2, bad, 4] for bad in ("3", float("nan"), float("inf"), 1e300, True)))
        ),
        ("images.1.id", "5", "image-entry", "", "a.png"),
        ("images.1.file_name", None, "image-entry", "", "5"),
        ("images.1.file_name", "\ud800.png", "image-entry", "", "5"),  # JSON can contain lone surrogates
        ("images.1.id", 42, "duplicate-image-id", "image 42", "'c.png' has the id of 'a.png'"),
    ],
)
def test_invalid_entries_are_ignored_and_reported(tmp_path, path, value, kind, entry, reason):
    split = write(tmp_path, edited(path, value))
    annotations = load_annotations(split)
    (issue,) = [issue for issue in annotations.issues if issue.kind == kind]
    assert (issue.severity, issue.file, issue.entry) == ("error", str(split.json), entry)
    assert reason in issue.value
    assert str(issue).isprintable()
    is_image = path.startswith("images")
    assert len(annotations.boxes) == (6 if is_image else 5)
    assert len(annotations) == (2 if is_image else 3)
    assert kind in annotations.summary(100)[1]
    issues = []
    truth = load_ground_truth(split.json, warn=issues.extend)
    assert len(truth["annotations"]) == len(annotations.boxes)
    assert [image["id"] for image in truth["images"]] == annotations.image_ids.tolist()
    assert [issue.kind for issue in issues] == [kind]
    json.dumps(truth, allow_nan=False)


def test_ambiguous_entries_are_used_and_reported(tmp_path):
    value = content()
    value["annotations"][0]["id"] = value["annotations"][1]["id"]
    value["images"][1]["file_name"] = "b.png"
    annotations = load_annotations(write(tmp_path, value))
    assert len(annotations) == 3
    assert len(annotations.boxes) == 6
    issues = {(issue.kind, issue.severity, issue.entry) for issue in annotations.issues}
    assert ("duplicate-annotation-id", "warning", "annotation 2") in issues
    assert ("duplicate-file", "warning", "image 5") in issues


def test_invalid_area_and_iscrowd_do_not_hide_objects(tmp_path):
    """pycocotools ignores objects with a negative area, and the string "0" is true."""
    value = content()
    value["annotations"][0] |= {"area": -1, "iscrowd": "0"}
    split = write(tmp_path, value)
    annotations = load_annotations(split)
    kinds = {issue.kind for issue in annotations.issues if issue.entry == "annotation 1"}
    assert kinds == {"area-invalid", "iscrowd-invalid"}
    assert len(annotations.objects(2)[1]) == 2
    truth = load_ground_truth(split.json)["annotations"][0]
    assert (truth["area"], truth["iscrowd"]) == (12, 0)


def test_a_box_without_area_in_float32_is_no_object(tmp_path):
    annotations = load_annotations(write(tmp_path, edited("annotations.0.bbox", [30, 3, 1e-7, 4])))
    assert len(annotations.objects(2)[1]) == 1
    assert "annotation 1" in [issue.entry for issue in annotations.issues if issue.kind == "zero-size"]


def test_boxes_beyond_the_edges_are_reported(tmp_path):
    value = content()
    boxes = {10: [0, 0, 20.9, 10.9], 11: [-0.9, 0, 5, 5], 12: [15, 5, 8, 3], 13: [20, 0, 5, 5], 14: [-9, 0, 9, 5]}
    boxes |= {15: [10, 5, 19, 9]}
    value["annotations"] += [{"id": id_, "image_id": 5, "category_id": 3, "bbox": box} for id_, box in boxes.items()]
    issues = {issue.entry: issue for issue in load_annotations(write(tmp_path, value)).issues}
    kinds = [issues[f"annotation {id_}"].kind if f"annotation {id_}" in issues else None for id_ in boxes]
    assert kinds == [None, None, "beyond-edge", "outside-image", "outside-image", "beyond-edge"]
    assert "bbox [15, 5, 8, 3], image 20 x 10" in issues["annotation 12"].value
    assert "x1, y1, x2, y2" in issues["annotation 15"].value


@pytest.mark.parametrize(
    ("box_format", "expected"), [("xywh", set()), ("xyxy", {"boxes-xyxy"}), ("cxcywh", {"boxes-fractions"})]
)
def test_other_box_formats_are_detected(tmp_path, box_format, expected):
    corners = np.sort(np.random.default_rng(0).random((40, 2, 2)), axis=1).reshape(-1, 4)  # xyxy in [0, 1]
    size = corners[:, 2:] - corners[:, :2]
    boxes = {
        "xywh": np.hstack([corners[:, :2], size]) * [20, 10, 20, 10],
        "xyxy": corners * [20, 10, 20, 10],
        "cxcywh": np.hstack([corners[:, :2] + size / 2, size]),
    }[box_format]
    annotations = [
        {"id": number, "image_id": 5, "category_id": 3, "bbox": box} for number, box in enumerate(boxes.tolist(), 1)
    ]
    issues = load_annotations(write(tmp_path, content() | {"annotations": annotations})).issues
    assert {issue.kind for issue in issues} & {"boxes-xyxy", "boxes-fractions"} == expected


# -- unusable files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *((text, "is not JSON") for text in ("", "{", "\x00\xff", '{"images": [}')),
        *((text, "no list 'images'") for text in ("[]", "3", "null", '{"info": {}}')),
        (json.dumps(content())[:-1] + ', "annotations": []}', "a key appears twice"),
        (edited("annotations", None), "no list 'annotations'"),
        (edited("annotations", [3]), "no list 'annotations'"),
        (edited("images", []), "no images"),
        (edited("categories", []), "no categories"),
        (edited("categories.1.id", 90), "category id appears twice"),
        (edited("categories.1.name", None), "no 'name'"),
        (edited("categories.1.name", "\ud800"), "no 'name'"),
    ],
)
def test_unusable_files_are_rejected(tmp_path, value, reason):
    split = write(tmp_path, value)
    for message in (user_error(load_annotations, split), user_error(load_ground_truth, split.json)):
        assert str(split.json) in message
        assert reason in message


def test_a_file_without_usable_images_is_rejected(tmp_path):
    split = write(tmp_path, edited("images", [{"file_name": "a.png"}]))
    message = user_error(load_annotations, split)
    assert str(split.json) in message
    assert "1 image-entry" in message


def test_a_missing_file_is_rejected(tmp_path):
    split = Split(tmp_path, tmp_path / "gone.json")
    for message in (user_error(load_annotations, split), user_error(load_ground_truth, split.json)):
        assert message.startswith(f"{tmp_path}/gone.json: cannot be read")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("categories", [*CATEGORIES, {"id": 2, "name": "yak"}], "category 2 ('yak')"),
        ("categories.2.name", "cup", "category 17 ('cup')"),
    ],
)
def test_validation_data_with_other_classes_is_rejected(tmp_path, path, value, reason):
    known = load_annotations(write(tmp_path, content())).categories
    message = user_error(load_annotations, write(tmp_path, edited(path, value)), known)
    for part in (str(tmp_path / "instances.json"), reason, "90 ('hair drier')"):
        assert part in message


def test_validation_data_with_fewer_classes_has_the_labels_of_training(tmp_path):
    known = load_annotations(write(tmp_path, content())).categories
    value = content()
    value["categories"] = value["categories"][:1]
    value["annotations"] = value["annotations"][1:2]
    annotations = load_annotations(write(tmp_path, value), known)
    assert annotations.categories == known
    assert annotations.objects(0)[1].tolist() == [2]
