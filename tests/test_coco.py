"""COCO files, good and bad. Every complaint is one line that names the file and what is wrong in it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pix2seq.data import Categories, Split, find_split, load_annotations
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import load_ground_truth

# Sparse ids, out of order, and names that code might trip over.
CATEGORIES = [
    {"id": 90, "name": "hair drier"},
    {"id": 3, "name": "Zuerich, 'old'"},
    {"id": 17, "name": "3"},
]


def content() -> dict:
    """Three pictures: one with a bit of everything, one without objects, one with two objects of the first class."""
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


def write(folder: Path, value, images=("a.png", "b.png", "c.png")) -> Split:
    split = Split(folder / "pictures", folder / "instances.json")
    split.images.mkdir(exist_ok=True)
    for name in images:
        Image.new("RGB", (20, 10)).save(split.images / name)
    split.json.write_text(value if isinstance(value, str) else json.dumps(value))
    return split


def complaint(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_categories_become_contiguous_labels_by_id(tmp_path):
    annotations = load_annotations(write(tmp_path, content()))
    assert annotations.categories == Categories((3, 17, 90), ("Zuerich, 'old'", "3", "hair drier"))
    boxes, labels = annotations.objects(0)
    assert labels.tolist() == [2]
    assert boxes.tolist() == [[0.5, 0.25, 3.0, 3.25]]
    assert boxes.dtype == np.float64
    assert annotations.objects(2)[1].tolist() == [0, 0]
    assert annotations.objects(2)[0].tolist() == [[1, 2, 4, 6], [5, 5, 6, 6]]


def test_the_files_order_and_names_are_kept(tmp_path):
    split = write(tmp_path, content())
    annotations = load_annotations(split)
    assert len(annotations) == 3
    assert annotations.image_ids.tolist() == [700, 5, 42]
    assert annotations.name(1) == f"{split.images}/a.png"


def test_images_without_objects_are_kept(tmp_path):
    boxes, labels = load_annotations(write(tmp_path, content())).objects(1)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_crowds_and_boxes_without_area_are_left_out_of_training_and_counted(tmp_path):
    annotations = load_annotations(write(tmp_path, content()))
    assert len(annotations.boxes) == 6
    assert annotations.crowd.sum() == 1
    assert annotations.trainable.sum() == 3
    summary, faults = annotations.summary(max_objects=1)
    assert "\n" not in summary
    for part in (
        "3 images (1 without objects)",
        "3 objects",
        "3 classes",
        "1 crowd boxes",
        "2 boxes without area",
        "1 images have more than 1 objects",
    ):
        assert part in summary
    assert "1 zero-size" in faults
    assert "1 negative-size" in faults
    assert "more than" not in annotations.summary(max_objects=2)[0]


def test_they_are_kept_in_the_ground_truth(tmp_path):
    """A bug others shipped: ground truth that went through training's filter."""
    truth = load_ground_truth(write(tmp_path, content()).json)
    assert len(truth["annotations"]) == 6
    assert sum(entry["iscrowd"] for entry in truth["annotations"]) == 1


def test_reading_changes_nothing_in_the_file(tmp_path):
    """A bug others shipped: the category ids of the ground truth were rewritten in place."""
    split = write(tmp_path, content())
    load_annotations(split)
    truth = load_ground_truth(split.json)
    assert truth["categories"] == CATEGORIES
    assert json.loads(split.json.read_text()) == content()


def test_a_file_without_annotations(tmp_path):
    annotations = load_annotations(write(tmp_path, content() | {"annotations": []}))
    assert annotations.objects(2)[0].shape == (0, 4)
    assert "3 images (3 without objects), 0 objects" in annotations.summary(100)[0]


def test_subset(tmp_path):
    annotations = load_annotations(write(tmp_path, content()))
    part = annotations.subset([2, 1])
    assert len(part) == 2
    assert part.image_ids.tolist() == [42, 5]
    assert part.name(0).endswith("/c.png")
    np.testing.assert_array_equal(part.objects(0)[0], annotations.objects(2)[0])
    assert part.objects(1)[0].shape == (0, 4)
    one = annotations.subset([0])
    np.testing.assert_array_equal(one.objects(0)[0], annotations.objects(0)[0])
    np.testing.assert_array_equal(one.objects(0)[1], annotations.objects(0)[1])
    assert one.categories == annotations.categories
    assert "1 crowd boxes, 2 boxes without area" in one.summary(100)[0]


# -- where things lie ------------------------------------------------------------------------------


def test_both_layouts_are_found(tmp_path, shapes_root):
    found = find_split("train", shapes_root)
    assert found == Split(shapes_root / "images/train2017", shapes_root / "annotations" / "instances_train2017.json")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    (tmp_path / "val2017").mkdir()
    assert find_split("val", str(tmp_path)).images == tmp_path / "val2017"


def test_a_missing_root(tmp_path):
    assert complaint(find_split, "val", tmp_path / "nowhere") == f"--root {tmp_path}/nowhere: no such folder"


def test_a_root_without_annotations(tmp_path):
    message = complaint(find_split, "val", tmp_path)
    assert str(tmp_path) in message
    assert "annotations/instances_val2017.json is missing" in message


def test_a_root_without_images(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    message = complaint(find_split, "val", tmp_path)
    assert str(tmp_path) in message
    assert "neither images/val2017 nor val2017" in message


# -- faults in an annotation file ------------------------------------------------------------------


def _set(path: str, value):
    """An edit of content(): the entry at a path like annotations.1.bbox gets a value."""

    def edit(document: dict) -> dict:
        *parents, last = path.split(".")
        place = document
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value
        return document

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_set("images", []), ["holds no images"]),
        (_set("images", [{"file_name": "a.png"}]), ["holds no images that can be used", "1 image-entry"]),
        (_set("categories", []), ["holds no categories"]),
        (_set("categories.1.id", 90), ["category id appears twice", "90"]),
        (_set("categories.1.name", None), ["lacks", "'name'", "3"]),
        (_set("annotations", None), ["no list 'annotations'"]),
        (_set("annotations", [3]), ["no list 'annotations'"]),
    ],
)
def test_what_makes_a_file_useless_is_named(tmp_path, edit, says):
    split = write(tmp_path, edit(content()))
    message = complaint(load_annotations, split)
    assert str(split.json) in message
    for part in says:
        assert part in message


LEFT_OUT = [
    (_set("annotations.1.category_id", 4), "unknown-category", "annotation 2", ["category 4", "3, 17, 90"]),
    (_set("annotations.1.category_id", None), "unknown-category", "annotation 2", ["category None"]),
    (_set("annotations.5.image_id", 43), "unknown-image", "annotation 6", ["image 43"]),
    (_set("annotations.0.bbox", [1, 2, 3]), "bbox-invalid", "annotation 1", ["[1, 2, 3]", "four finite numbers"]),
    (_set("annotations.0.bbox", [1, 2, 3, "4"]), "bbox-invalid", "annotation 1", ["'4'"]),
    (_set("annotations.0.bbox", None), "bbox-invalid", "annotation 1", ["None"]),
    *(
        (_set("annotations.0.bbox", [1, 2, bad, 4]), "bbox-invalid", "annotation 1", [])
        for bad in (float("nan"), float("inf"), 1e300, True)
    ),
    (_set("images.1.id", "5"), "image-entry", "", ["'id'", "a.png"]),
    (_set("images.1.file_name", None), "image-entry", "", ["'file_name'", "5"]),
    (_set("images.1.id", 42), "duplicate-image-id", "image 42", ["'c.png'", "'a.png'"]),
]


@pytest.mark.parametrize(("edit", "kind", "entry", "says"), LEFT_OUT)
def test_entries_that_cannot_be_used_are_left_out_and_named(tmp_path, edit, kind, entry, says):
    """From training and from the ground truth alike, and nothing else is."""
    split = write(tmp_path, edit(content()))
    annotations = load_annotations(split)
    (fault,) = [fault for fault in annotations.issues if fault.kind == kind]
    assert (fault.severity, fault.file, fault.entry) == ("error", str(split.json), entry)
    for part in says:
        assert part in fault.value
    lost = kind not in ("image-entry", "duplicate-image-id")
    assert len(annotations.boxes) == 6 - lost
    assert len(annotations) == 3 - (not lost)
    assert kind in annotations.summary(100)[1]
    told = []
    truth = load_ground_truth(split.json, warn=told.extend)
    assert len(truth["annotations"]) == 6 - lost
    assert [image["id"] for image in truth["images"]] == annotations.image_ids.tolist()
    assert [fault.kind for fault in told] == [kind]
    json.dumps(truth, allow_nan=False)


def test_faults_that_are_used_all_the_same(tmp_path):
    value = content()
    value["annotations"][0]["id"] = value["annotations"][1]["id"]
    value["images"][1]["file_name"] = "b.png"
    annotations = load_annotations(write(tmp_path, value))
    assert len(annotations) == 3
    assert len(annotations.boxes) == 6
    kinds = {fault.kind: fault for fault in annotations.issues}
    assert kinds["duplicate-annotation-id"].entry == "annotation 2"
    assert kinds["duplicate-file"].entry == "image 5"
    assert {fault.severity for fault in (kinds["duplicate-annotation-id"], kinds["duplicate-file"])} == {"warning"}


def test_odd_areas_and_crowds_are_told_and_do_not_hide_objects(tmp_path):
    """pycocotools ignores objects of negative area without a word, and "0" is true."""
    value = content()
    value["annotations"][0] |= {"area": -1, "iscrowd": "0"}
    split = write(tmp_path, value)
    annotations = load_annotations(split)
    assert {fault.kind for fault in annotations.issues if fault.entry == "annotation 1"} == {
        *("area-invalid", "iscrowd-invalid")
    }
    assert len(annotations.objects(2)[1]) == 2
    truth = load_ground_truth(split.json)["annotations"][0]
    assert (truth["area"], truth["iscrowd"]) == (12, 0)


def test_a_box_thinner_than_float32_can_tell_is_no_object(tmp_path):
    value = content()
    value["annotations"][0]["bbox"] = [30, 3, 1e-7, 4]
    annotations = load_annotations(write(tmp_path, value))
    assert len(annotations.objects(2)[1]) == 1
    assert "annotation 1" in [fault.entry for fault in annotations.issues if fault.kind == "zero-size"]


@pytest.mark.parametrize("size", [(10.0, 20.0), (10, 20)])
def test_whole_numbers_may_be_written_as_floats(tmp_path, size):
    value = content()
    value["images"][0] |= {"height": size[0], "width": size[1]}
    assert load_annotations(write(tmp_path, value)).sizes[0].tolist() == [10, 20]


@pytest.mark.parametrize("size", [("10", 20), (-10, 20), (10.5, 20), (True, 20), (2**40, 20), (float("nan"), 20)])
def test_other_sizes_are_unknown(tmp_path, size):
    value = content()
    value["images"][0] |= {"height": size[0], "width": size[1]}
    assert load_annotations(write(tmp_path, value)).sizes[0].tolist() == [0, 0]


def test_halves_of_characters_are_told(tmp_path):
    """JSON may hold them, and nothing can write them."""
    value = content()
    value["images"][1]["file_name"] = "\ud800.png"
    faults = load_annotations(write(tmp_path, value)).issues
    assert [fault.kind for fault in faults] == ["image-entry", "negative-size", "zero-size"]
    print(*faults)
    value = content()
    value["categories"][0]["name"] = "\ud800"
    assert "lacks" in complaint(load_annotations, write(tmp_path, value))


def test_a_key_that_stands_twice_is_named(tmp_path):
    text = json.dumps(content())[:-1] + ', "annotations": []}'
    assert "a key stands twice" in complaint(load_annotations, write(tmp_path, text))


def test_boxes_are_compared_to_the_edges_of_their_images(tmp_path):
    value = content()  # all images are 20 x 10
    boxes = {10: [0, 0, 20.9, 10.9], 11: [-0.9, 0, 5, 5], 12: [15, 5, 8, 3], 13: [20, 0, 5, 5], 14: [-9, 0, 9, 5]}
    boxes |= {15: [10, 5, 19, 9]}
    value["annotations"] += [
        {"id": number, "image_id": 5, "category_id": 3, "bbox": box} for number, box in boxes.items()
    ]
    found = {fault.entry: (fault.kind, fault.value) for fault in load_annotations(write(tmp_path, value)).issues}
    assert "annotation 10" not in found  # rounding
    assert "annotation 11" not in found
    assert found["annotation 12"] == ("beyond-edge", "bbox [15, 5, 8, 3], image 20 x 10")
    assert found["annotation 13"][0] == found["annotation 14"][0] == "outside-image"
    assert "as x1, y1, x2, y2 it would fit" in found["annotation 15"][1]


@pytest.mark.parametrize(
    ("form", "told"), [("xywh", set()), ("xyxy", {"boxes-xyxy"}), ("cxcywh", {"boxes-fractions"})]
)
def test_boxes_of_another_form_are_suspected(tmp_path, form, told):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((40, 2, 2)), axis=1).reshape(-1, 4)  # x1, y1, x2, y2 in [0, 1]
    size = corners[:, 2:] - corners[:, :2]
    boxes = {
        "xywh": np.hstack([corners[:, :2], size]) * [20, 10, 20, 10],
        "xyxy": corners * [20, 10, 20, 10],
        "cxcywh": np.hstack([corners[:, :2] + size / 2, size]),
    }[form]
    value = content()
    value["annotations"] = [
        {"id": n + 1, "image_id": 5, "category_id": 3, "bbox": box} for n, box in enumerate(boxes.tolist())
    ]
    kinds = {fault.kind for fault in load_annotations(write(tmp_path, value)).issues}
    assert kinds & {"boxes-xyxy", "boxes-fractions"} == told


@pytest.mark.parametrize("text", ["", "{", "\x00\xff", '{"images": [}'])
def test_what_is_not_json_is_named(tmp_path, text):
    split = write(tmp_path, text)
    for load in (load_annotations, lambda split: load_ground_truth(split.json)):
        assert f"{split.json}: is not JSON" in complaint(load, split)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"info": {}}'])
def test_json_that_is_not_coco_is_named(tmp_path, text):
    split = write(tmp_path, text)
    assert f"{split.json}: has no list 'images'" in complaint(load_annotations, split)
    assert f"{split.json}: has no list" in complaint(load_ground_truth, split.json)


def test_a_missing_file_is_named(tmp_path):
    split = Split(tmp_path, tmp_path / "gone.json")
    for load, argument in ((load_annotations, split), (load_ground_truth, split.json)):
        assert complaint(load, argument).startswith(f"{tmp_path}/gone.json: cannot be read")


def test_validation_may_use_only_the_classes_of_training(tmp_path):
    training = load_annotations(write(tmp_path, content())).categories
    value = content()
    value["categories"].append({"id": 2, "name": "yak"})
    message = complaint(load_annotations, write(tmp_path, value), training)
    for part in (str(tmp_path / "instances.json"), "category 2 ('yak')", "90 ('hair drier')"):
        assert part in message
    message = complaint(load_annotations, write(tmp_path, _set("categories.2.name", "cup")(content())), training)
    assert "category 17 ('cup')" in message


def test_validation_with_fewer_classes_keeps_the_labels_of_training(tmp_path):
    training = load_annotations(write(tmp_path, content())).categories
    value = content()
    value["categories"] = value["categories"][:1]
    value["annotations"] = value["annotations"][1:2]
    annotations = load_annotations(write(tmp_path, value), training)
    assert annotations.categories == training
    assert annotations.objects(0)[1].tolist() == [2]


# -- ground truth and predictions ------------------------------------------------------------------
