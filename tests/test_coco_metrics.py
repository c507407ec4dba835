"""COCO metrics equal those of pycocotools, and invalid files are repaired or rejected."""

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
from tests.test_coco import content, user_error, write

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 11, "name": "dog"}, {"id": 90, "name": "eel"}]


def make_ground_truth(boxes_by_image: dict[int, list], category_id: int = 3) -> dict:
    """COCO annotations from xywh boxes by image id."""
    annotations = [
        {"image_id": image_id, "category_id": category_id, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for image_id, boxes in boxes_by_image.items()
        for box in boxes
    ]
    return {
        "images": [{"id": image_id, "file_name": f"{image_id}.png"} for image_id in boxes_by_image],
        "annotations": [{"id": number} | entry for number, entry in enumerate(annotations, start=1)],
        "categories": CATEGORIES,
    }


def perfect_predictions(ground_truth: dict, score: float = 1.0) -> list[dict]:
    return [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": score}
        for entry in ground_truth["annotations"]
        if not entry["iscrowd"]
    ]


def reload(folder, ground_truth: dict) -> dict:
    """Writes and loads annotations."""
    (folder / "truth.json").write_text(json.dumps(ground_truth))
    return load_ground_truth(folder / "truth.json")


def evaluate_with_pycocotools(ground_truth, predictions) -> tuple[dict[str, float], COCOeval]:
    """Evaluates as in the demo of pycocotools, from files or from their content. Returns metrics and evaluation."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(None if isinstance(ground_truth, dict) else str(ground_truth))
        if isinstance(ground_truth, dict):
            coco.dataset = copy.deepcopy(ground_truth)
            coco.createIndex()
        # loadRes fails on an empty list, but COCOeval does not.
        results = (
            coco.loadRes(predictions if isinstance(predictions, list) else str(predictions)) if predictions else COCO()
        )
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(METRICS, evaluation.stats.tolist(), strict=True))
    for index, category in enumerate(CATEGORIES):
        precision = evaluation.eval["precision"][:, :, index, 0, 2]
        precision = precision[precision > -1]
        metrics[f"per_class/{category['name']}"] = float(precision.mean()) if precision.size else -1.0
    return metrics, evaluation


def random_dataset(seed: int) -> tuple[dict, list[dict]]:
    """Objects of all sizes with crowds; accurate, inaccurate and random predictions with equal scores among them."""
    rng = np.random.default_rng(seed)
    images, annotations, predictions = [], [], []

    def predict(image_id: int, category_id: int, box, score: float) -> None:
        box = [float(value) for value in box]
        predictions.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": float(score)})

    for number in range(int(rng.integers(1, 7))):
        image_id = int(1000 - 7 * number)
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 640, "height": 480})
        for _ in range(int(rng.integers(0, 9))):
            width, height = np.exp(rng.uniform(1.5, 5.5, 2))
            box = [*rng.uniform(0, 300, 2), width, height]
            category_id = int(rng.choice([category["id"] for category in CATEGORIES]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [float(value) for value in box],
                    "area": float(width * height * rng.uniform(0.5, 1)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                moved = np.array(box) * rng.normal(1, 0.08, 4)
                category_id = category_id if rng.random() < 0.8 else 90
                predict(image_id, category_id, moved, np.round(rng.random(), 2))
        for _ in range(int(rng.integers(0, 4))):
            predict(image_id, 11, [*rng.uniform(0, 300, 2), *rng.uniform(5, 100, 2)], rng.random())
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, predictions


# -- parity with pycocotools -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(1, 10))
def test_metrics_equal_pycocotools_from_files(tmp_path, seed):
    ground_truth, predictions = random_dataset(seed)
    (tmp_path / "predictions.json").write_text(json.dumps(predictions))
    metrics = coco_metrics(reload(tmp_path, ground_truth), predictions)
    expected, _ = evaluate_with_pycocotools(tmp_path / "truth.json", tmp_path / "predictions.json")
    assert metrics == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.parametrize("kind", ["valid", "invalid boxes and negative ids"])
def test_metrics_equal_pycocotools(kind):
    for seed in range(500 if kind == "valid" else 60):
        ground_truth, predictions = random_dataset(seed)
        if kind != "valid":
            rng = np.random.default_rng(seed)
            for entry in ground_truth["annotations"][::2] + predictions[::3]:
                entry["bbox"][int(rng.integers(2, 4))] *= float(rng.choice([0, -1, 1e-9, 1e6]))
            for entry in ground_truth["annotations"] + predictions:
                entry["image_id"] -= 990
            for image in ground_truth["images"]:
                image["id"] -= 990
        expected, _ = evaluate_with_pycocotools(ground_truth, predictions)
        assert coco_metrics(ground_truth, predictions) == pytest.approx(expected, abs=1e-12, rel=0)


def test_unused_keys_may_have_any_value():
    ground_truth = make_ground_truth({1: [(0, 0, 10, 10)], 2: [(5, 5, 20, 20)]})
    expected = coco_metrics(ground_truth, perfect_predictions(ground_truth))
    ground_truth["images"][0] |= {"license": "CC", "width": None, "height": -1, "coco_url": 5, "date_captured": 5}
    ground_truth["annotations"][0] |= {"segmentation": 7, "obb": [], "is_group_of": "?"}
    ground_truth["categories"] = [category | {"supercategory": 5, "skeleton": 5} for category in CATEGORIES]
    ground_truth |= {"info": 3, "licenses": "?"}
    assert coco_metrics(ground_truth, perfect_predictions(ground_truth)) == expected


# -- values known by hand --------------------------------------------------------------------------


def test_metric_names_match_their_values():
    """Of objects with sides of 16, 60 and 200 pixels, the middle one is found, at IoU 0.61."""
    ground_truth = make_ground_truth({1: [[0, 0, 16, 16], [100, 0, 60, 60], [0, 200, 200, 200]]})
    prediction = {"image_id": 1, "category_id": 3, "bbox": [100, 0, 60, 36.6], "score": 0.9}
    metrics = coco_metrics(ground_truth, [prediction])
    assert metrics["AP_small"] == metrics["AP_large"] == metrics["AR_small"] == metrics["AR_large"] == 0
    assert [metrics["AP_medium"], metrics["AR_medium"]] == pytest.approx([0.3, 0.3])
    assert metrics["AP75"] == 0
    assert metrics["AP50"] == pytest.approx(34 / 101)
    assert [metrics["AR_1"], metrics["AR_100"]] == pytest.approx([0.1, 0.1])


def test_perfect_predictions_score_one():
    ground_truth = make_ground_truth({5: [[1, 2, 30, 40], [50, 60, 10, 12]], 9: [[0, 0, 100, 120]], 7: []})
    metrics = coco_metrics(ground_truth, perfect_predictions(ground_truth))
    assert metrics["AP"] == metrics["AP50"] == metrics["AR_100"] == metrics["per_class/cat"] == pytest.approx(1)
    assert metrics["per_class/dog"] == -1
    assert set(metrics) == {*METRICS, "per_class/cat", "per_class/dog", "per_class/eel"}
    assert all(type(value) is float for value in metrics.values())


def test_no_predictions_score_zero_and_no_objects_minus_one():
    metrics = coco_metrics(make_ground_truth({5: [[1, 2, 30, 40]], 9: []}), [])
    assert (metrics["AP"], metrics["AR_100"], metrics["AP_large"]) == (0, 0, -1)
    empty = make_ground_truth({5: []})
    assert coco_metrics(empty, [])["AP"] == -1
    prediction = {"image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}
    assert coco_metrics(empty, [prediction])["AP"] == -1


def test_inputs_are_not_changed_and_nothing_is_printed(capsys):
    ground_truth = make_ground_truth({5: [[1, 2, 30, 40]]})
    predictions = perfect_predictions(ground_truth)
    before = json.dumps(predictions)
    first = coco_metrics(ground_truth, predictions)
    assert json.dumps(predictions) == before
    assert coco_metrics(ground_truth, predictions) == first
    assert capsys.readouterr().out == ""


def test_scores_rank_the_predictions():
    ground_truth = make_ground_truth({image_id: [[10, 10, 30, 30]] for image_id in range(10)})
    correct = perfect_predictions(ground_truth)
    wrong = [prediction | {"bbox": [100, 100, 30, 30]} for prediction in correct]
    ranked = [row | {"score": 0.9} for row in correct] + [row | {"score": 0.1} for row in wrong]
    unranked = [row for pair in zip(wrong, correct, strict=True) for row in pair]
    assert coco_metrics(ground_truth, ranked)["AP"] == pytest.approx(1)
    assert coco_metrics(ground_truth, unranked)["AP"] < 0.6


def test_images_with_more_than_100_objects_keep_them(tmp_path):
    boxes = [[12 * (i % 40), 12 * (i // 40), 10, 10] for i in range(120)]
    ground_truth = reload(tmp_path, make_ground_truth({1: boxes}))
    metrics = coco_metrics(ground_truth, perfect_predictions(ground_truth))
    assert metrics["AR_100"] == pytest.approx(100 / 120)
    assert metrics["AR_10"] == pytest.approx(10 / 120)


def test_predictions_on_crowds_are_ignored(tmp_path):
    ground_truth = make_ground_truth({1: [[0, 0, 40, 40], [100, 100, 200, 200]]})
    ground_truth["annotations"][1]["iscrowd"] = 1
    ground_truth = reload(tmp_path, ground_truth)
    inside = [{"image_id": 1, "category_id": 3, "bbox": [120 + 20 * i, 120, 15, 15], "score": 0.95} for i in range(5)]
    predictions = perfect_predictions(ground_truth, 0.9) + inside
    assert coco_metrics(ground_truth, predictions)["AP"] == pytest.approx(1)
    ground_truth["annotations"] = ground_truth["annotations"][:1]
    assert coco_metrics(ground_truth, predictions)["AP"] < 0.5


def test_table_contains_all_metrics():
    names = ("cat", "a\nb", "größe")
    metrics = dict.fromkeys(METRICS, 0.0) | {"AP": 0.1234, "AR_large": -1.0}
    metrics |= {f"per_class/{name}": 0.4567 for name in names}
    table = metrics_table(metrics)
    for part in (*METRICS, "0.123", "-1.000", "cat", "a\\nb", "größe", "0.457"):
        assert part in table
    assert max(map(len, table.splitlines())) <= 80


# -- ground truth ----------------------------------------------------------------------------------


def test_annotation_id_zero_counts(tmp_path):
    """pycocotools takes a match with annotation 0 for no match."""
    ground_truth = make_ground_truth({1: [[0, 0, 40, 40], [100, 100, 50, 50]]})
    for number, annotation in enumerate(ground_truth["annotations"]):
        annotation["id"] = number
    predictions = perfect_predictions(ground_truth)
    assert coco_metrics(reload(tmp_path, ground_truth), predictions)["AP"] == pytest.approx(1)


def test_missing_ids_areas_and_iscrowd_are_filled_in(tmp_path):
    document = content()
    for annotation in document["annotations"]:
        del annotation["id"]
    document["annotations"][0]["area"] = 7.5
    annotations = load_ground_truth(str(write(tmp_path, document).json))["annotations"]
    assert [annotation["id"] for annotation in annotations] == [1, 2, 3, 4, 5, 6]
    assert [annotation["iscrowd"] for annotation in annotations] == [0, 0, 1, 0, 0, 0]
    assert [annotation["area"] for annotation in annotations[:3]] == [7.5, 7.5, 200]
    assert annotations[5]["area"] == 1


def test_ground_truth_of_some_images(tmp_path):
    ground_truth = load_ground_truth(write(tmp_path, content()).json, np.array([42, 5]))
    assert [image["id"] for image in ground_truth["images"]] == [5, 42]
    assert {annotation["image_id"] for annotation in ground_truth["annotations"]} == {42}
    assert ground_truth["categories"] == content()["categories"]


def test_ground_truth_without_categories_is_rejected(tmp_path):
    split = write(tmp_path, content() | {"categories": []})
    assert str(split.json) in user_error(load_ground_truth, split.json)


# -- predictions -----------------------------------------------------------------------------------

VALID = {"image_id": 42, "category_id": 3, "bbox": [1.0, 2, 3, 4], "score": 0.5}


def test_valid_predictions_are_accepted():
    check_predictions([], content())
    check_predictions([VALID, VALID | {"score": 1}, VALID | {"segmentation": []}], content())


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_invalid_predictions_are_counted(change, message):
    predictions = [VALID, VALID | change, VALID, VALID | change]
    error = user_error(check_predictions, predictions, content())
    assert message in error
    assert "2 of 4" in error
    assert "first entry 1" in error
    with pytest.raises(UserError):
        coco_metrics(content(), predictions)


def test_incomplete_predictions_are_rejected():
    for key in VALID:
        incomplete = {k: v for k, v in VALID.items() if k != key}
        assert "1 of 2 lack image_id" in user_error(check_predictions, [VALID, incomplete], content())
    assert "1 of 1 lack" in user_error(check_predictions, ["box"], content())
    assert "list" in user_error(check_predictions, {"predictions": []}, content())


def test_all_reasons_are_reported():
    error = user_error(check_predictions, [VALID | {"image_id": 1}, VALID | {"score": "high"}], content())
    assert "1 of 2 name an image" in error
    assert "1 of 2 have a box or score" in error


def test_load_predictions(tmp_path):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps([VALID]))
    assert load_predictions(path) == [VALID]
    path.write_text("[")
    assert f"--predictions {path}" in user_error(load_predictions, path)
    assert f"--predictions {tmp_path}/no.json" in user_error(load_predictions, tmp_path / "no.json")
