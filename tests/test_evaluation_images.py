"""Images of predictions, and of one image over training."""

import numpy as np
import pytest
from PIL import Image

from pix2seq.data import Annotations, EvalDataset, find_split, load_annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation import prediction_image
from pix2seq.evaluation.coco_metrics import load_ground_truth
from pix2seq.generation import DecodingOptions
from pix2seq.training.evaluator import TrainingEvaluator
from pix2seq.training.run_folder import MAX_HISTORY_STEPS, RunFolder
from pix2seq.transforms import EvalTransform
from pix2seq.visualization import CAPTION_HEIGHT, CELL, MARGIN, STRIP_COLUMNS, side_by_side
from tests.test_evaluation import ONE_PROCESS

# -- predictions -----------------------------------------------------------------------------------


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


# -- one image over training -----------------------------------------------------------------------


def write_sample(folder: RunFolder, step: int) -> None:
    """Writes a sample whose third prediction has the brightness `step`."""
    cell = (CELL, CELL)
    pairs = [(Image.new("L", cell, 7 if n == 2 else 9), Image.new("L", cell, step)) for n in range(3)]
    sheet = side_by_side([tuple(image.convert("RGB") for image in pair) for pair in pairs])
    folder.sample("predictions", step, sheet)


def strip_values(folder: RunFolder) -> list[int]:
    """The brightness of each image of the strip, the ground truth first."""
    pixels = np.asarray(Image.open(folder.path / "samples" / "strip.png"))[..., 0]
    pitch = CELL + MARGIN + CAPTION_HEIGHT
    values = [
        int(pixels[y - CELL // 2, x + CELL // 2])
        for y in range(pitch, pixels.shape[0], pitch)
        for x in range(MARGIN, pixels.shape[1], CELL + MARGIN)
    ]
    return [value for value in values if value != 255]


def test_strip_of_a_resumed_run_has_each_step_once(tmp_path):
    folder = RunFolder(tmp_path, is_main=True)
    for step in (10, 20, 30, 40):
        write_sample(folder, step)
        folder.sample_history(step, 2)
        assert strip_values(folder) == [7, *range(10, step + 1, 10)]
    (tmp_path / "samples" / "predictions_00000010.png").write_bytes(b"incomplete")
    (tmp_path / "samples" / "predictions_best.png").write_bytes(b"another file")
    resumed = RunFolder(tmp_path, is_main=True)
    write_sample(resumed, 30)  # resumed from a checkpoint at step 20
    resumed.sample_history(30, 2)
    assert strip_values(resumed) == [7, 20, 30]


def test_strip_shows_at_most_some_steps_with_the_first_and_the_last(tmp_path):
    folder = RunFolder(tmp_path, is_main=True)
    for step in range(10, 40):
        write_sample(folder, step)
    folder.sample_history(39, 2)
    _, *steps = strip_values(folder)
    assert (len(steps), steps[0], steps[-1]) == (MAX_HISTORY_STEPS, 10, 39)
    assert set(np.diff(steps).tolist()) <= {2, 3}
    assert Image.open(tmp_path / "samples" / "strip.png").width == STRIP_COLUMNS * (CELL + MARGIN) + MARGIN


def test_training_evaluator_draws_strip_and_predictions(shapes_root, make_model, annotations, tmp_path):
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
    for columns, step in enumerate((1, 2), start=2):
        evaluator.sample(model, step)
        assert Image.open(tmp_path / "samples" / "strip.png").width == columns * (CELL + MARGIN) + MARGIN
    evaluator.evaluate(model, 2)
    assert (tmp_path / "eval" / "step_2" / "predictions.png").is_file()
