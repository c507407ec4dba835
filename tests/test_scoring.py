"""The numbers are pycocotools', whatever the file looks like, and what it would misread is put right or refused."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import (
    METRICS,
    check_predictions,
    coco_metrics,
    load_ground_truth,
    load_predictions,
    metrics_table,
)
from tests.test_coco import complaint, content, write

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 11, "name": "dog"}, {"id": 90, "name": "eel"}]


def ground_truth(boxes_by_image: dict[int, list], category: int = 3) -> dict:
    """xywh boxes by image id, as a COCO file's content."""
    entries = [
        {"image_id": image_id, "category_id": category, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for image_id, boxes in boxes_by_image.items()
        for box in boxes
    ]
    return {
        "images": [{"id": image_id, "file_name": f"{image_id}.png"} for image_id in boxes_by_image],
        "annotations": [{"id": number} | entry for number, entry in enumerate(entries, start=1)],
        "categories": CATEGORIES,
    }


def as_predictions(truth: dict, score: float = 1.0) -> list[dict]:
    return [
        {"image_id": e["image_id"], "category_id": e["category_id"], "bbox": e["bbox"], "score": score}
        for e in truth["annotations"]
        if not e["iscrowd"]
    ]


def load(tmp_path, truth: dict) -> dict:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    return load_ground_truth(path)


def plain_pycocotools(truth_path, predictions_path) -> tuple[np.ndarray, COCOeval]:
    """The way pycocotools' own demo does it, from files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_path))
        evaluation = COCOeval(truth, truth.loadRes(str(predictions_path)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation


def random_dataset(seed: int) -> tuple[dict, list[dict]]:
    """Ground truth of all sizes with crowds, and predictions: good ones, poor ones and inventions."""
    rng = np.random.default_rng(seed)
    annotations, predictions, images = [], [], []
    for number in range(int(rng.integers(1, 7))):
        image_id = int(1000 - 7 * number)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 640, "height": 480})
        for _ in range(int(rng.integers(0, 9))):
            width, height = np.exp(rng.uniform(1.5, 5.5, 2))
            box = [*rng.uniform(0, 300, 2), width, height]
            category = int(rng.choice([c["id"] for c in CATEGORIES]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [float(v) for v in box],
                    "area": float(width * height * rng.uniform(0.5, 1)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                moved = np.array(box) * rng.normal(1, 0.08, 4)
                category = category if rng.random() < 0.8 else 90
                predictions.append(
                    {
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [float(v) for v in moved],
                        "score": float(np.round(rng.random(), 2)),  # rounded, so that there are ties
                    }
                )
        for _ in range(int(rng.integers(0, 4))):
            box = [*rng.uniform(0, 300, 2), *rng.uniform(5, 100, 2)]
            predictions.append(
                {
                    "image_id": image_id,
                    "category_id": 11,
                    "bbox": [float(v) for v in box],
                    "score": float(rng.random()),
                }
            )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, predictions


@pytest.mark.parametrize("seed", range(30))
def test_the_numbers_are_pycocotools(tmp_path, seed):
    truth, predictions = random_dataset(seed)
    if not predictions:
        predictions = [{"image_id": truth["images"][0]["id"], "category_id": 3, "bbox": [1, 1, 5, 5], "score": 0.5}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    expected, evaluation = plain_pycocotools(tmp_path / "truth.json", tmp_path / "predictions.json")
    metrics = coco_metrics(load_ground_truth(tmp_path / "truth.json"), predictions)
    assert [metrics[name] for name in METRICS] == pytest.approx(expected.tolist(), abs=1e-12, rel=0)
    classes = [metrics[f"per_class/{c['name']}"] for c in CATEGORIES]
    for index, value in enumerate(classes):
        precision = evaluation.eval["precision"][:, :, index, 0, 2]
        precision = precision[precision > -1]
        assert value == pytest.approx(precision.mean() if precision.size else -1, abs=1e-12, rel=0)
    found = [value for value in classes if value > -1]
    assert metrics["AP"] == pytest.approx(np.mean(found) if found else -1, abs=1e-12)


def test_the_fast_numbers_are_those_of_pycocotools():
    """500 datasets, every number of them, those of classes included."""
    for seed in range(500):
        truth, predictions = random_dataset(seed)
        slow = coco_metrics(copy.deepcopy(truth), predictions, backend="pycocotools")
        assert coco_metrics(truth, predictions) == pytest.approx(slow, abs=1e-12, rel=0)


def test_odd_boxes_and_ids_have_the_same_numbers_too():
    """Boxes without area or turned inside out stay in the ground truth, and ids are any whole numbers."""
    for seed in range(60):
        truth, predictions = random_dataset(seed)
        rng = np.random.default_rng(seed)
        for entry in truth["annotations"][::2] + predictions[::3]:
            entry["bbox"][int(rng.integers(2, 4))] *= float(rng.choice([0, -1, 1e-9, 1e6]))
        for entry in truth["annotations"] + predictions:
            entry["image_id"] -= 990
        for image in truth["images"]:
            image["id"] -= 990
        slow = coco_metrics(copy.deepcopy(truth), predictions, backend="pycocotools")
        assert coco_metrics(truth, predictions) == pytest.approx(slow, abs=1e-12, rel=0)


def test_what_nobody_needs_may_be_anything():
    truth = ground_truth({1: [(0, 0, 10, 10)], 2: [(5, 5, 20, 20)]})
    expected = coco_metrics(truth, as_predictions(truth))
    truth["images"][0] |= {"license": "CC", "width": None, "height": -1, "coco_url": 5, "date_captured": 5}
    truth["annotations"][0] |= {
        "keypoints": "x",
        "num_keypoints": 1.5,
        "segmentation": 7,
        "obb": [],
        "is_group_of": "?",
    }
    truth["categories"] = [
        entry | {"supercategory": 5, "skeleton": 5, "frequency": 5} for entry in truth["categories"]
    ]
    assert coco_metrics(truth | {"info": 3, "licenses": "?"}, as_predictions(truth)) == expected


def test_names_stand_for_pycocotools_rows():
    """Of sizes 16, 60 and 200 pixels only the middle one is found, and only loosely: each name must be its row."""
    truth = ground_truth({1: [[0, 0, 16, 16], [100, 0, 60, 60], [0, 200, 200, 200]]})
    loose = [{"image_id": 1, "category_id": 3, "bbox": [100, 0, 60, 36.6], "score": 0.9}]  # IoU 0.61
    metrics = coco_metrics(truth, loose)
    assert metrics["AP_small"] == metrics["AP_large"] == metrics["AR_small"] == metrics["AR_large"] == 0
    assert [metrics["AP_medium"], metrics["AR_medium"]] == pytest.approx([0.3, 0.3])
    assert metrics["AP75"] == 0
    assert metrics["AP50"] == pytest.approx(34 / 101)  # a third of the recall, at 101 points
    assert [metrics["AR_1"], metrics["AR_100"]] == pytest.approx([0.1, 0.1])


def test_perfect_predictions_score_one():
    truth = ground_truth({5: [[1, 2, 30, 40], [50, 60, 10, 12]], 9: [[0, 0, 100, 120]], 7: []})
    metrics = coco_metrics(truth, as_predictions(truth))
    assert metrics["AP"] == metrics["AP50"] == metrics["AR_100"] == metrics["per_class/cat"] == pytest.approx(1)
    assert metrics["per_class/dog"] == -1
    assert set(metrics) == {*METRICS, "per_class/cat", "per_class/dog", "per_class/eel"}
    assert all(type(value) is float for value in metrics.values())


def test_no_predictions_score_zero():
    truth = ground_truth({5: [[1, 2, 30, 40]], 9: []})
    metrics = coco_metrics(truth, [])
    assert metrics["AP"] == metrics["AR_100"] == 0
    assert metrics["AP_large"] == -1


def test_no_ground_truth_is_minus_one():
    truth = ground_truth({5: []})
    assert coco_metrics(truth, [])["AP"] == -1
    prediction = {"image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}
    assert coco_metrics(truth, [prediction])["AP"] == -1


def test_faulty_predictions_are_refused():
    truth = ground_truth({5: [[1, 2, 30, 40]]})
    with pytest.raises(UserError, match="1 of 2 name an image"):
        coco_metrics(truth, as_predictions(truth) + [as_predictions(truth)[0] | {"image_id": 6}])


def test_nothing_is_printed_or_changed(capsys):
    truth = ground_truth({5: [[1, 2, 30, 40]]})
    predictions = as_predictions(truth)
    before = json.dumps(predictions)
    first = coco_metrics(truth, predictions)
    assert json.dumps(predictions) == before
    assert coco_metrics(truth, predictions) == first
    assert capsys.readouterr().out == ""


def test_ranking_makes_the_difference():
    """A bug others shipped: with all scores 1 an evaluator cannot rank, and AP says little."""
    truth = ground_truth({i: [[10, 10, 30, 30]] for i in range(10)})
    right = as_predictions(truth)
    wrong = [row | {"bbox": [100, 100, 30, 30]} for row in right]
    ranked = [r | {"score": 0.9} for r in right] + [w | {"score": 0.1} for w in wrong]
    flat = [row | {"score": 1.0} for pair in zip(wrong, right, strict=True) for row in pair]
    assert coco_metrics(truth, ranked)["AP"] == pytest.approx(1)
    assert coco_metrics(truth, flat)["AP"] < 0.6


def test_crowded_images_keep_all_their_boxes(tmp_path):
    """A bug others shipped: ground truth cut to 100 boxes. With 120, 100 detections reach a recall of 100/120."""
    boxes = [[12 * (i % 40), 12 * (i // 40), 10, 10] for i in range(120)]
    truth = load(tmp_path, ground_truth({1: boxes}))
    assert len(truth["annotations"]) == 120
    metrics = coco_metrics(truth, as_predictions(truth))
    assert metrics["AR_100"] == pytest.approx(100 / 120)
    assert metrics["AR_10"] == pytest.approx(10 / 120)


def test_crowds_are_kept_in_evaluation(tmp_path):
    """A bug others shipped: without its crowd box, what is found inside the crowd counts as wrong."""
    truth = ground_truth({1: [[0, 0, 40, 40], [100, 100, 200, 200]]})
    truth["annotations"][1]["iscrowd"] = 1
    truth = load(tmp_path, truth)
    inside = [{"image_id": 1, "category_id": 3, "bbox": [120 + 20 * i, 120, 15, 15], "score": 0.95} for i in range(5)]
    assert coco_metrics(truth, as_predictions(truth) + inside)["AP"] == pytest.approx(1)
    truth["annotations"] = truth["annotations"][:1]
    assert coco_metrics(truth, as_predictions(truth, 0.9) + inside)["AP"] < 0.5


def test_annotation_id_zero_is_not_ignored(tmp_path):
    """pycocotools stores a match by annotation id and takes 0 for none: load_ground_truth numbers from 1."""
    truth = ground_truth({1: [[0, 0, 40, 40], [100, 100, 50, 50]]})
    for number, entry in enumerate(truth["annotations"]):
        entry["id"] = number
    predictions = as_predictions(truth)
    assert coco_metrics(load(tmp_path, truth), predictions)["AP"] == pytest.approx(1)


# -- from detections to results --------------------------------------------------------------------


def test_the_table_holds_the_numbers():
    truth = ground_truth({5: [[1, 2, 30, 40]]})
    metrics = coco_metrics(truth, as_predictions(truth)) | {"AP": 0.1234, "AR_large": 0.9876, "per_class/dog": 0.4567}
    table = metrics_table(metrics)
    for part in (*METRICS, "0.123", "0.988", "cat", "dog", "eel", "0.457", "-1.000"):
        assert part in table
    assert max(map(len, table.splitlines())) <= 80


def test_ground_truth_is_made_fit_for_pycocotools(tmp_path):
    value = content()
    for number, entry in enumerate(value["annotations"]):
        entry["id"] = number  # pycocotools takes a match with annotation 0 for no match
    value["annotations"][0]["area"] = 7.5
    truth = load_ground_truth(str(write(tmp_path, value).json))
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["iscrowd"] for entry in truth["annotations"]] == [0, 0, 1, 0, 0, 0]
    assert [entry["area"] for entry in truth["annotations"]][:3] == [7.5, 7.5, 200]
    assert truth["annotations"][5]["area"] == 1


def test_ground_truth_without_ids(tmp_path):
    value = content()
    for entry in value["annotations"]:
        del entry["id"]
    assert [e["id"] for e in load_ground_truth(write(tmp_path, value).json)["annotations"]] == [1, 2, 3, 4, 5, 6]


def test_ground_truth_of_some_images(tmp_path):
    truth = load_ground_truth(write(tmp_path, content()).json, np.array([42, 5]))
    assert [image["id"] for image in truth["images"]] == [5, 42]
    assert {entry["image_id"] for entry in truth["annotations"]} == {42}
    assert truth["categories"] == content()["categories"]


def test_ground_truth_without_categories_is_refused(tmp_path):
    split = write(tmp_path, content() | {"categories": []})
    assert complaint(load_ground_truth, split.json) == f"{split.json}: holds no categories"


GOOD = {"image_id": 42, "category_id": 3, "bbox": [1.0, 2, 3, 4], "score": 0.5}


def test_good_predictions_pass():
    check_predictions([], content())
    check_predictions([GOOD, GOOD | {"score": 1}, GOOD | {"segmentation": []}], content())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"image_id": 43}, "name an image that is not in the ground truth (43)"),
        ({"image_id": "42"}, "name an image that is not in the ground truth ('42')"),
        ({"category_id": 1}, "name a category that is not in the ground truth (1)"),
        ({"bbox": [1, 2, 3]}, "finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "finite numbers"),
        ({"bbox": "1 2 3 4"}, "finite numbers"),
        ({"score": float("inf")}, "finite numbers"),
        ({"score": None}, "finite numbers"),
        ({"score": True}, "finite numbers"),
    ],
)
def test_faults_of_predictions_are_counted(bad, says):
    message = complaint(check_predictions, [GOOD, GOOD | bad, GOOD, GOOD | bad], content())
    assert says in message
    assert "2 of 4" in message
    assert "first entry 1" in message


def test_predictions_that_lack_something():
    for key in GOOD:
        row = {k: v for k, v in GOOD.items() if k != key}
        assert "1 of 2 lack image_id" in complaint(check_predictions, [GOOD, row], content())
    assert "1 of 1 lack" in complaint(check_predictions, ["box"], content())
    assert "list" in complaint(check_predictions, {"predictions": []}, content())


def test_different_faults_are_all_told():
    message = complaint(check_predictions, [GOOD | {"image_id": 1}, GOOD | {"score": "high"}], content())
    assert "1 of 2 name an image" in message
    assert "1 of 2 have a box or score" in message


def test_load_predictions(tmp_path):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([GOOD]))
    assert load_predictions(path) == [GOOD]
    path.write_text("[")
    assert complaint(load_predictions, path).startswith(f"--predictions {path}: is not JSON")
    assert complaint(load_predictions, tmp_path / "no.json").startswith(f"--predictions {tmp_path}/no.json: cannot")
