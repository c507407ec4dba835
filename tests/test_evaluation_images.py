"""Images of predictions."""

import numpy as np
import pytest

from pix2seq.data import Annotations, EvalDataset, find_split, load_annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation import prediction_image
from pix2seq.evaluation.coco_metrics import load_ground_truth
from pix2seq.generation import DecodingOptions
from pix2seq.training.evaluator import TrainingEvaluator
from pix2seq.training.run_folder import RunFolder
from pix2seq.transforms import EvalTransform
from pix2seq.visualization import CELL, MARGIN
from tests.test_evaluation import ONE_PROCESS


@pytest.fixture
def annotations(shapes_root) -> Annotations:
    return load_annotations(find_split("val", shapes_root))


def prediction(image_id: int, category_id: int, box: list, score: float) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": [float(v) for v in box], "score": score}


def test_low_scores_are_not_drawn(annotations):
    predictions = [prediction(1, 7, [5, 5, 20, 20], score) for score in (0.9, 0.1)]
    empty = np.asarray(prediction_image(annotations, [], 2))
    np.testing.assert_array_equal(np.asarray(prediction_image(annotations, predictions[1:], 2)), empty)
    assert (np.asarray(prediction_image(annotations, predictions, 2)) != empty).any()
    assert prediction_image(annotations, predictions, 100).width >= empty.shape[1]


def test_unreadable_images_are_drawn_gray(annotations, monkeypatch):
    def image_file(self, index):
        raise BadImageError("unreadable-file", "it is empty")

    monkeypatch.setattr(Annotations, "image_file", image_file)
    assert prediction_image(annotations, [], 1).width == 2 * (CELL + MARGIN) + MARGIN


def test_training_evaluator_draws_samples_and_predictions(shapes_root, make_model, annotations, tmp_path):
    evaluator = TrainingEvaluator(
        folder=RunFolder(tmp_path, is_main=True),
        accelerator=ONE_PROCESS,
        val_set=EvalDataset(annotations, EvalTransform(64)),
        ground_truth=load_ground_truth(annotations.split.json),
        options=DecodingOptions(max_objects=2, top_p=0),
        batch_size=5,
        num_workers=0,
        stop=False,
    )
    model = make_model(decoder_layers=1)
    for step in (1, 2):
        evaluator.sample(model, step)
        assert (tmp_path / "samples" / f"predictions_{step:08d}.png").is_file()
    evaluator.evaluate(model, 2)
    assert (tmp_path / "eval" / "step_2" / "predictions.png").is_file()
