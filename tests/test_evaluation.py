"""Every image counts once, in its own pixels, whatever the batches and the ranks."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pix2seq.data import Categories, EvalDataset, Split, find_split, load_annotations
from pix2seq.evaluation import coco_results, oracle_predictions, predict, prediction_image
from pix2seq.evaluation.coco_metrics import coco_metrics, load_ground_truth
from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.models.detections import Detections, to_detections
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform
from tests.test_scoring import ground_truth


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
    found = find_split(split, shapes_root)
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
    reduce=lambda tensor, reduction: tensor,
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

    def detect(self, pixels, options, interrupted):
        return to_detections(generate_tokens(self, pixels, self.tokenizer, options), self.tokenizer)

    def start(self, pixels, length):
        assert not self.training
        return np.stack([self.sentences[picture.numpy().tobytes()] for picture in pixels])

    def step(self, ids, position, steps, rows):
        logits = torch.nn.functional.one_hot(torch.from_numpy(steps[:, position]), self.tokenizer.vocab_size)
        return 30.0 * logits[:, rows]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_predict_evaluates_every_image_in_order(shapes_root, batch_size, training):
    split = find_split("val", shapes_root)
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
    data = EvalDataset(load_annotations(find_split("val", shapes_root)).subset([3, 1]), EvalTransform(64))
    model = Oracle(data, Tokenizer(4, 100), max_objects=6)
    predictions = predict(model, data, DecodingOptions(max_objects=6), 2, ONE_PROCESS)
    assert [row["image_id"] for row in predictions] == [4] * 6 + [2] * 6


def test_predict_does_not_depend_on_the_batch_size(shapes_root, make_model):
    data = EvalDataset(load_annotations(find_split("val", shapes_root)), EvalTransform(64))
    model = make_model(decoder_layers=1)
    options = DecodingOptions(max_objects=2, top_p=0)
    one, five = (predict(model, data, options, batch_size, ONE_PROCESS) for batch_size in (1, 5))
    assert [row["bbox"] for row in one] == [row["bbox"] for row in five]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in five], abs=1e-5)
    assert {row["category_id"] for row in one} <= {1, 3, 7, 11}
    truth = load_ground_truth(find_split("val", shapes_root).json)
    assert 0 <= coco_metrics(truth, one)["AP"] < 0.5


# -- what people look at ---------------------------------------------------------------------------


def test_prediction_pictures(shapes_root):
    annotations = load_annotations(find_split("val", shapes_root))
    assert annotations.categories == Categories((1, 3, 7, 11), ("ellipse", "rectangle", "triangle", "cross"))
    rows = [{"image_id": 1, "category_id": 7, "bbox": [5.0, 5, 20, 20], "score": score} for score in (0.9, 0.1)]
    empty = np.asarray(prediction_image(annotations, [], 2))
    low = np.asarray(prediction_image(annotations, rows[1:], 2))
    both = np.asarray(prediction_image(annotations, rows, 2))
    np.testing.assert_array_equal(empty, low)  # below the least score that is shown
    assert (both != empty).any()
    assert prediction_image(annotations, rows, 100).size[0] >= both.shape[1]


def test_logits_that_are_not_finite_name_their_images(shapes_root, make_model):
    data = EvalDataset(load_annotations(find_split("val", shapes_root)), EvalTransform(64))
    model = make_model(decoder_layers=1)
    whole = model.encode
    model.encode = lambda pixels: whole(pixels).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(RuntimeError, match=r"image ids \[2\]: the detector's logits are NaN"):
        predict(model, data, DecodingOptions(max_objects=2, top_p=0), 5, ONE_PROCESS)
