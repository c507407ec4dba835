"""Predictions of a model over a dataset: each image once, in original pixels, for any batch size."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pix2seq.data import EvalDataset, Split, find_split, load_annotations
from pix2seq.evaluation import coco_results, oracle_predictions, predict
from pix2seq.evaluation.coco_metrics import coco_metrics, load_ground_truth
from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.models.detections import Detections, to_detections
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform
from tests.test_coco_metrics import make_ground_truth

ONE_PROCESS = SimpleNamespace(  # stands in for Accelerate's Accelerator
    process_index=0,
    num_processes=1,
    is_main_process=True,
    device=torch.device("cpu"),
    autocast=contextlib.nullcontext,
    reduce=lambda tensor, reduction: tensor,
    gather_for_metrics=lambda results, use_gather_object: results,
)


def test_results_have_original_ids_and_all_digits_and_are_sorted():
    boxes = np.array([[1 / 3, 2.123456789, 10.5, 20.25], [0, 0, 5, 5], [1, 1, 2, 3]])
    scores = np.array([0.123456789, 0.9, 0.5])
    results = coco_results(397133, Detections(boxes, np.array([2, 0, 1]), scores), [3, 11, 90])
    assert [result["score"] for result in results] == [0.9, 0.5, 0.123456789]
    assert [result["category_id"] for result in results] == [3, 11, 90]
    assert {result["image_id"] for result in results} == {397133}
    assert results[2]["bbox"] == [1 / 3, 2.123456789, 10.5 - 1 / 3, 20.25 - 2.123456789]
    assert json.loads(json.dumps(results)) == results


def test_equal_scores_keep_the_order_of_the_sequence():
    detections = Detections(np.arange(12.0).reshape(3, 4), np.array([0, 1, 0]), np.array([0.5, 0.5, 0.5]))
    assert [result["bbox"][0] for result in coco_results(1, detections, [3, 11])] == [0, 4, 8]
    assert coco_results(1, Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)), [3]) == []


@pytest.mark.parametrize("split", ["train", "val"])
def test_oracle_ap_is_nearly_one(shapes_root, split):
    split = find_split(split, shapes_root)
    dataset = EvalDataset(load_annotations(split), EvalTransform(640))
    predictions = oracle_predictions(dataset, Tokenizer(4, 1000))
    assert coco_metrics(load_ground_truth(split.json), predictions)["AP"] >= 0.99


def test_oracle_ap_of_images_that_are_not_square(tmp_path):
    (tmp_path / "images").mkdir()
    for image_id, size in ((1, (200, 50)), (2, (33, 250))):
        Image.new("RGB", size).save(tmp_path / f"images/{image_id}.png")
    document = make_ground_truth({1: [[10, 5, 30, 20], [100, 3, 90, 40]], 2: [[2, 100, 20, 90]]})
    (tmp_path / "truth.json").write_text(json.dumps(document))
    dataset = EvalDataset(load_annotations(Split(tmp_path / "images", tmp_path / "truth.json")), EvalTransform(640))
    fine, coarse = (
        coco_metrics(load_ground_truth(tmp_path / "truth.json"), oracle_predictions(dataset, Tokenizer(3, num_bins)))
        for num_bins in (1000, 20)
    )
    assert fine["AP"] >= 0.99
    assert coarse["AP"] < 0.9


class OracleModel(torch.nn.Module):
    """Generates the target sequence of each image, which it looks up by its pixels."""

    def __init__(self, dataset: EvalDataset, tokenizer: Tokenizer, max_objects: int):
        super().__init__()
        annotations = dataset.annotations
        self.config = SimpleNamespace(category_ids=list(annotations.categories.ids), noise_objects=True)
        self.tokenizer, self.sequences = tokenizer, {}
        for index in range(len(dataset)):
            boxes, labels = annotations.objects(index)
            num_noise = max_objects - len(boxes)
            boxes = np.concatenate([boxes / 64, np.zeros((num_noise, 4))])
            labels = np.concatenate([labels, np.full(num_noise, -1)])
            key = dataset[index]["pixel_values"].numpy().tobytes()
            self.sequences[key] = tokenizer.encode(boxes, labels).reshape(-1)

    def detect(self, pixel_values, options, interrupted):
        return to_detections(generate_tokens(self, pixel_values, self.tokenizer, options), self.tokenizer, options)

    def prefill(self, pixel_values, max_length):
        assert not self.training
        return np.stack([self.sequences[image.numpy().tobytes()] for image in pixel_values])

    def decode_step(self, token_ids, position, incremental_decoder, vocab_slice):
        next_ids = torch.from_numpy(incremental_decoder[:, position])
        return 30.0 * torch.nn.functional.one_hot(next_ids, self.tokenizer.vocab_size)[:, vocab_slice]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_predict_evaluates_every_image_in_order(shapes_root, batch_size, training):
    split = find_split("val", shapes_root)
    dataset = EvalDataset(load_annotations(split), EvalTransform(80))
    model = OracleModel(dataset, Tokenizer(4, 1000), max_objects=6).train(training)
    predictions = predict(model, dataset, DecodingOptions(max_objects=6, top_p=0), batch_size, ONE_PROCESS)
    assert model.training == training
    assert [prediction["image_id"] for prediction in predictions] == [i for i in range(1, 6) for _ in range(6)]
    assert coco_metrics(load_ground_truth(split.json), predictions)["AP"] >= 0.99


def test_predict_on_a_subset(shapes_root):
    annotations = load_annotations(find_split("val", shapes_root)).subset([3, 1])
    dataset = EvalDataset(annotations, EvalTransform(64))
    model = OracleModel(dataset, Tokenizer(4, 100), max_objects=6)
    predictions = predict(model, dataset, DecodingOptions(max_objects=6), 2, ONE_PROCESS)
    assert [prediction["image_id"] for prediction in predictions] == [4] * 6 + [2] * 6


def test_predictions_do_not_depend_on_the_batch_size(shapes_root, make_model):
    dataset = EvalDataset(load_annotations(find_split("val", shapes_root)), EvalTransform(64))
    model, options = make_model(decoder_layers=1), DecodingOptions(max_objects=2, top_p=0)
    one, five = (predict(model, dataset, options, batch_size, ONE_PROCESS) for batch_size in (1, 5))
    assert [prediction["bbox"] for prediction in one] == [prediction["bbox"] for prediction in five]
    scores = [prediction["score"] for prediction in five]
    assert [prediction["score"] for prediction in one] == pytest.approx(scores, abs=1e-5)
    assert {prediction["category_id"] for prediction in one} <= {1, 3, 7, 11}


def test_non_finite_logits_name_the_images(shapes_root, make_model):
    dataset = EvalDataset(load_annotations(find_split("val", shapes_root)), EvalTransform(64))
    model = make_model(decoder_layers=1)
    encode = model.encode
    model.encode = lambda pixel_values: encode(pixel_values).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(RuntimeError, match=r"image ids \[2\]"):
        predict(model, dataset, DecodingOptions(max_objects=2, top_p=0), 5, ONE_PROCESS)
