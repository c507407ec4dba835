"""Images of predictions, of the worst images, and of one image over training."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from pix2seq.data import Annotations, EvalDataset, find_split, load_annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation import prediction_image, worst_image
from pix2seq.evaluation.coco_metrics import load_ground_truth
from pix2seq.evaluation.images import find_worst
from pix2seq.generation import DecodingOptions
from pix2seq.training.evaluator import TrainingEvaluator
from pix2seq.training.run_folder import MAX_HISTORY_STEPS, RunFolder
from pix2seq.transforms import EvalTransform
from pix2seq.visualization import CAPTION_HEIGHT, CELL, MARGIN, STRIP_COLUMNS, WRONG, side_by_side
from tests.test_evaluation import ONE_PROCESS

# -- predictions and worst images ------------------------------------------------------------------


@pytest.fixture
def annotations(shapes_root) -> Annotations:
    return load_annotations(find_split("val", shapes_root))


def prediction(image_id: int, category_id: int, box: list, score: float) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": [float(v) for v in box], "score": score}


def perfect_predictions(annotations: Annotations) -> list[dict]:
    return [
        prediction(image_id, annotations.categories.ids[label], [x1, y1, x2 - x1, y2 - y1], 0.9)
        for index, image_id in enumerate(annotations.image_ids.tolist())
        for (x1, y1, x2, y2), label in zip(*annotations.objects(index), strict=True)
    ]


def on_background(image_id: int, score: float) -> dict:
    return prediction(image_id, 1, [0, 0, 1, 1], score)


def test_low_scores_are_not_drawn(annotations):
    predictions = [prediction(1, 7, [5, 5, 20, 20], score) for score in (0.9, 0.1)]
    empty = np.asarray(prediction_image(annotations, [], 2))
    np.testing.assert_array_equal(np.asarray(prediction_image(annotations, predictions[1:], 2)), empty)
    assert (np.asarray(prediction_image(annotations, predictions, 2)) != empty).any()
    assert prediction_image(annotations, predictions, 100).width >= empty.shape[1]


def test_worst_images_are_those_with_errors(annotations):
    ids = annotations.image_ids.tolist()
    predictions = [entry for entry in perfect_predictions(annotations) if entry["image_id"] != ids[3]]
    predictions += [on_background(ids[1], 0.99), on_background(ids[4], 0.6), on_background(ids[0], 0.2)]
    worst = {image.index: image for image in find_worst(annotations, predictions, 8)}
    assert set(worst) == {1, 3, 4}
    assert [image.index for image in find_worst(annotations, predictions, 2)] == [3, 1]  # agreement, then score
    assert [image.index for image in find_worst(annotations, predictions, 1)] == [3]
    assert worst[3].agreement == 0
    assert not worst[3].is_found.any()
    assert worst[1].agreement == len(worst[1].is_found) / (len(worst[1].is_found) + 1)
    assert worst[1].highest_wrong_score == 0.99
    assert worst[1].is_found.all()


def test_wrong_class_is_an_error_but_a_duplicate_is_not(annotations):
    predictions = perfect_predictions(annotations)
    duplicates = [entry | {"score": 0.5} for entry in predictions]
    assert find_worst(annotations, predictions + duplicates, 8) == []
    other_class = next(i for i in annotations.categories.ids if i != predictions[0]["category_id"])
    (image,) = find_worst(annotations, [predictions[0] | {"category_id": other_class}, *predictions[1:]], 8)
    assert (~image.is_found).sum() == (~image.is_correct).sum() == 1


def test_crowds_are_ignored(annotations):
    predictions = perfect_predictions(annotations)
    crowd = np.arange(len(annotations.boxes)) == 0
    with_crowd = replace(annotations, crowd=crowd, trainable=annotations.trainable & ~crowd)
    x, y, width, height = predictions[0]["bbox"]
    part = predictions[0] | {"bbox": [x, y, width / 3, height / 3]}
    assert find_worst(with_crowd, [part, *predictions[1:]], 8) == []
    assert [image.index for image in find_worst(annotations, [part, *predictions[1:]], 8)] == [0]


def test_only_the_drawn_images_are_read(annotations, monkeypatch):
    read, image_file = [], Annotations.image_file
    monkeypatch.setattr(Annotations, "image_file", lambda self, index: read.append(index) or image_file(self, index))
    assert worst_image(annotations, [], 3).width == 4 * (CELL + MARGIN) + MARGIN
    assert len(read) == len(set(read)) == 3
    read.clear()
    worst_image(annotations, perfect_predictions(annotations), 8)
    assert read == []


def test_wrong_predictions_are_orange(annotations):
    predictions = [*perfect_predictions(annotations), on_background(annotations.image_ids[1], 0.99)]
    orange = (np.asarray(worst_image(annotations, predictions, 8)) == ImageColor.getrgb(WRONG)).all(axis=-1)
    middle = orange.shape[1] // 2
    assert not orange[:, :middle].any()
    assert orange[:, middle:].any()


def test_unreadable_images_are_drawn_gray(annotations, monkeypatch):
    def image_file(self, index):
        raise BadImageError("unreadable-file", "it is empty")

    monkeypatch.setattr(Annotations, "image_file", image_file)
    assert worst_image(annotations, [], 1).width == 2 * (CELL + MARGIN) + MARGIN
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


def test_training_evaluator_draws_strip_and_worst_images(shapes_root, make_model, annotations, tmp_path):
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
    assert (tmp_path / "eval" / "step_2" / "worst.png").is_file()
