"""The numbers are pycocotools', whatever the file looks like, and every image counts once."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pix2seq.coco import Categories, DataError, Split, coco_split, load_annotations, load_ground_truth
from pix2seq.data import EvalDataset
from pix2seq.decoding import DecodingOptions, Detections
from pix2seq.evaluation import (
    METRICS,
    coco_metrics,
    coco_results,
    metrics_table,
    oracle_predictions,
    predict,
    prediction_picture,
)
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform

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
    with pytest.raises(DataError, match="1 of 2 name an image"):
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


def test_results_keep_ids_and_every_digit_and_are_sorted():
    boxes = np.array([[1 / 3, 2.123456789, 10.5, 20.25], [0, 0, 5, 5], [1, 1, 2, 3]])
    scores = np.array([0.123456789, 0.9, 0.5])
    rows = coco_results(397133, Detections(boxes, np.array([2, 0, 1]), scores), [3, 11, 90])
    assert [row["score"] for row in rows] == [0.9, 0.5, 0.123456789]
    assert [row["category_id"] for row in rows] == [3, 11, 90]
    assert {row["image_id"] for row in rows} == {397133}
    assert rows[2]["bbox"] == [1 / 3, 2.123456789, 10.5 - 1 / 3, 20.25 - 2.123456789]
    assert json.loads(json.dumps(rows)) == rows  # plain numbers, nothing of numpy's
    assert type(rows[0]["image_id"]) is int
    assert type(rows[0]["category_id"]) is int


def test_equal_scores_keep_their_order():
    """A model says the surest objects first, so the order of the sentence is a tie-break worth keeping."""
    found = Detections(np.arange(12.0).reshape(3, 4), np.array([0, 1, 0]), np.array([0.5, 0.5, 0.5]))
    assert [row["bbox"][0] for row in coco_results(1, found, [3, 11])] == [0, 4, 8]


def test_no_detections_give_no_results():
    assert coco_results(1, Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)), [3]) == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_oracle_scores_nearly_one(shapes_root, split):
    """The whole way there and back: file, transform, tokens, boxes, file. Anything off by a pixel shows here."""
    found = coco_split(shapes_root, split)
    data = EvalDataset(load_annotations(found), EvalTransform(640))
    predictions = oracle_predictions(data, Tokenizer(4, 1000))
    assert coco_metrics(load_ground_truth(found.json), predictions)["AP"] >= 0.99


def test_the_oracle_on_pictures_that_are_not_square(tmp_path):
    (tmp_path / "pictures").mkdir()
    truth = ground_truth({1: [[10, 5, 30, 20], [100, 3, 90, 40]], 2: [[2, 100, 20, 90]]})
    for image_id, size in ((1, (200, 50)), (2, (33, 250))):
        Image.new("RGB", size).save(tmp_path / f"pictures/{image_id}.png")
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    data = EvalDataset(load_annotations(Split(tmp_path / "pictures", tmp_path / "truth.json")), EvalTransform(640))
    predictions = oracle_predictions(data, Tokenizer(3, 1000))
    assert coco_metrics(load_ground_truth(tmp_path / "truth.json"), predictions)["AP"] >= 0.99
    coarse = oracle_predictions(data, Tokenizer(3, 20))
    assert coco_metrics(load_ground_truth(tmp_path / "truth.json"), coarse)["AP"] < 0.9


# -- predict ---------------------------------------------------------------------------------------

ONE_PROCESS = SimpleNamespace(
    process_index=0,
    num_processes=1,
    is_main_process=True,
    device=torch.device("cpu"),
    autocast=contextlib.nullcontext,
    gather_for_metrics=lambda results, use_gather_object: results,
)


class Oracle(torch.nn.Module):
    """A model that says the sentence of the picture it is shown; pictures are told apart by their pixels."""

    def __init__(self, data: EvalDataset, tokenizer: Tokenizer, max_objects: int):
        super().__init__()
        self.config = SimpleNamespace(
            category_ids=list(data.annotations.categories.ids), num_bins=tokenizer.num_bins, noise_objects=True
        )
        self.tokenizer, self.sentences = tokenizer, {}
        for index in range(len(data)):
            boxes, labels = data.annotations.objects(index)
            picture = data[index]["pixel_values"]
            side = np.array([64.0] * 4)
            filled = np.concatenate([boxes / side, np.zeros((max_objects - len(boxes), 4))])
            padded = np.concatenate([labels, np.full(max_objects - len(boxes), -1)])
            self.sentences[picture.numpy().tobytes()] = tokenizer.encode(filled, padded).reshape(-1)

    def start(self, pixels):
        assert not self.training
        return np.stack([self.sentences[picture.numpy().tobytes()] for picture in pixels])

    def step(self, ids, position, cache):
        return 30.0 * torch.nn.functional.one_hot(torch.from_numpy(cache[:, position]), self.tokenizer.vocab_size)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_predict_evaluates_every_image_in_order(shapes_root, batch_size, training):
    split = coco_split(shapes_root, "val")
    data = EvalDataset(load_annotations(split), EvalTransform(80))
    model = Oracle(data, Tokenizer(4, 1000), max_objects=6).train(training)
    predictions = predict(model, data, DecodingOptions(max_objects=6, top_p=0), batch_size, ONE_PROCESS)
    assert model.training == training
    ids = [row["image_id"] for row in predictions]
    assert ids == sorted(ids)
    assert len(ids) == 5 * 6  # all slots are kept, as the authors do
    # Slots that were noise have a class all the same, of vanishing score.
    assert coco_metrics(load_ground_truth(split.json), predictions)["AP"] >= 0.99


def test_predict_on_some_images_only(shapes_root):
    data = EvalDataset(load_annotations(coco_split(shapes_root, "val")).subset([3, 1]), EvalTransform(64))
    model = Oracle(data, Tokenizer(4, 100), max_objects=6)
    predictions = predict(model, data, DecodingOptions(max_objects=6), 2, ONE_PROCESS)
    assert [row["image_id"] for row in predictions] == [4] * 6 + [2] * 6


def test_predict_does_not_depend_on_the_batch_size(shapes_root, make_model):
    data = EvalDataset(load_annotations(coco_split(shapes_root, "val")), EvalTransform(64))
    model = make_model(decoder_layers=1)
    options = DecodingOptions(max_objects=2, top_p=0)
    one, five = (predict(model, data, options, batch_size, ONE_PROCESS) for batch_size in (1, 5))
    assert [row["bbox"] for row in one] == [row["bbox"] for row in five]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in five], abs=1e-5)
    assert {row["category_id"] for row in one} <= {1, 3, 7, 11}
    truth = load_ground_truth(coco_split(shapes_root, "val").json)
    assert 0 <= coco_metrics(truth, one)["AP"] < 0.5


# -- what people look at ---------------------------------------------------------------------------


def test_the_table_holds_the_numbers():
    truth = ground_truth({5: [[1, 2, 30, 40]]})
    metrics = coco_metrics(truth, as_predictions(truth)) | {"AP": 0.1234, "AR_large": 0.9876, "per_class/dog": 0.4567}
    table = metrics_table(metrics)
    for part in (*METRICS, "0.123", "0.988", "cat", "dog", "eel", "0.457", "-1.000"):
        assert part in table
    assert max(map(len, table.splitlines())) <= 80


def test_prediction_pictures(shapes_root):
    annotations = load_annotations(coco_split(shapes_root, "val"))
    assert annotations.categories == Categories((1, 3, 7, 11), ("ellipse", "rectangle", "triangle", "cross"))
    rows = [{"image_id": 1, "category_id": 7, "bbox": [5.0, 5, 20, 20], "score": score} for score in (0.9, 0.1)]
    empty = np.asarray(prediction_picture(annotations, [], 2))
    low = np.asarray(prediction_picture(annotations, rows[1:], 2))
    both = np.asarray(prediction_picture(annotations, rows, 2))
    np.testing.assert_array_equal(empty, low)  # below the least score that is shown
    assert (both != empty).any()
    assert prediction_picture(annotations, rows, 100).size[0] >= both.shape[1]
