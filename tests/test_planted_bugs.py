"""Typical bugs of a training pipeline, planted one by one: metrics reveal each of them within a hundred steps.

docs/what-to-expect.md names the same metrics. Every run is a complete run of train.py on small images of shapes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from pix2seq import train, transforms
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.data.coco import Annotations
from pix2seq.data.shapes import draw_dataset
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.sequence import SequenceBuilder
from tests.runs import NO_EVALUATION, rows

SMALL = [
    "--backbone",
    "{model_type: resnet, embedding_size: 16, hidden_sizes: [16, 32], depths: [1, 1], layer_type: basic}",
    *("--decoder", "transformer", "--hidden_size", "64", "--encoder_layers", "0", "--decoder_layers", "2"),
    *("--num_heads", "2", "--mlp_size", "128", "--dropout", "0", "--drop_path", "0"),
    *("--position_embedding", "fine", "--bin_init", "sine", "--image_size", "32", "--num_bins", "32"),
    *("--max_objects", "4", "--scale_max", "1.0", "--batch_size", "16", "--eval_batch_size", "2"),
    *("--num_workers", "0", "--lr", "2e-3", "--warmup_steps", "10", "--max_steps", "100", "--log_every", "50"),
    *(*NO_EVALUATION, "--ckpt_every", "0"),
]
OVERFIT = ["--overfit", "16", "--flip", "0", "--scale_min", "1.0", "--object_order", "area", "--lr", "5e-3"]


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Returns a function that trains and returns the last row of training metrics, the mean of up to 50 steps."""
    folder = tmp_path_factory.mktemp("planted")
    root = draw_dataset(folder / "shapes", num_train=400, num_val=2, size=32, max_shapes=3, seed=3)

    def learn(name: str, *words: str) -> dict[str, float]:
        words = [*SMALL, *words, "--root", str(root), "--output_dir", str(folder / name)]
        assert train.run_training(parse(TrainArguments, words)) == 0
        return [row for row in rows(folder / name) if "train/loss" in row][-1]

    return learn


@pytest.fixture(scope="module")
def healthy(learn) -> dict[str, float]:
    return learn("healthy")


@pytest.fixture(scope="module")
def overfit(learn) -> dict[str, float]:
    return learn("overfit", *OVERFIT)


def edit_examples(monkeypatch, edit) -> None:
    original = SequenceBuilder.__call__
    monkeypatch.setattr(SequenceBuilder, "__call__", lambda *args, **kwargs: edit(original(*args, **kwargs)))


def xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def test_a_healthy_run(healthy, overfit):
    assert healthy["train/iou"] > 0.12
    assert healthy["train/bin_error_y2"] < 4  # chance is a third of the 32 bins
    assert healthy["train/acc_noise"] > 0.9
    checks = {name: value for name, value in healthy.items() if name.startswith("data/")}
    assert len(checks) == 4
    assert set(checks.values()) == {0.0}
    assert overfit["train/bin_error_y1"] < 0.8  # predicting it requires the image
    assert overfit["train/iou"] > 0.9


def test_a_model_that_ignores_the_image(overfit, learn, monkeypatch):
    """It can predict the rest of a sequence from its first coordinate, but not the first coordinate."""
    original = Pix2SeqForObjectDetection.forward

    def forward(self, pixel_values, *args, **kwargs):
        return original(self, torch.zeros_like(pixel_values), *args, **kwargs)

    monkeypatch.setattr(Pix2SeqForObjectDetection, "forward", forward)
    buggy = learn("blind", *OVERFIT)
    assert buggy["train/bin_error_y1"] > 1.2 > 0.8 > overfit["train/bin_error_y1"]
    assert buggy["train/iou"] < 0.85 < 0.9 < overfit["train/iou"]
    assert buggy["train/bin_error_y2"] < 0.3
    assert {buggy[name] for name in buggy if name.startswith("data/")} == {0.0}


@pytest.mark.parametrize("shift", [1, -1], ids=["late", "early"])
def test_labels_shifted_by_one_token(healthy, learn, monkeypatch, shift):
    edit_examples(monkeypatch, lambda example: example | {"labels": np.roll(example["labels"], shift)})
    buggy = learn(f"shifted{shift}", *(() if shift > 0 else ("--max_steps", "5")))
    assert buggy["data/misplaced_tokens"] > 0.4 > 0 == healthy["data/misplaced_tokens"]
    if shift > 0:  # the label is the current input token
        assert buggy["train/acc_x1"] > 0.95 > 0.3 > healthy["train/acc_x1"]


def test_xywh_boxes_in_the_sequence(healthy, learn, monkeypatch):
    original = SequenceBuilder.__call__

    def build(self, boxes, *args, **kwargs):
        return original(self, xyxy_to_xywh(boxes), *args, **kwargs)

    monkeypatch.setattr(SequenceBuilder, "__call__", build)
    buggy = learn("xywh_sequence")
    assert buggy["data/inverted_boxes"] > 0.5 > 0 == healthy["data/inverted_boxes"]
    assert buggy["train/iou"] < 0.5 * healthy["train/iou"]


def test_xywh_boxes_in_the_augmentation(healthy, learn, monkeypatch):
    """The augmentation removes boxes without area, so more slots are noise."""
    original = Annotations.objects

    def objects(self, index):
        boxes, labels = original(self, index)
        return xyxy_to_xywh(boxes), labels

    monkeypatch.setattr(Annotations, "objects", objects)
    buggy = learn("xywh_augmentation")
    assert buggy["train/noise_true"] > healthy["train/noise_true"] + 0.2
    assert buggy["train/iou"] < 0.5 * healthy["train/iou"]


def test_supervised_coordinates_of_noise_objects(healthy, learn, monkeypatch):
    edit_examples(monkeypatch, lambda example: example | {"token_weights": np.ones_like(example["token_weights"])})
    buggy = learn("noise")
    assert buggy["data/supervised_noise"] == pytest.approx(buggy["train/noise_true"])
    assert buggy["data/supervised_noise"] > 0.4 > 0 == healthy["data/supervised_noise"]
    assert buggy["train/bin_error_y1"] > 1.15 * healthy["train/bin_error_y1"]


def test_boxes_normalised_by_the_image_instead_of_the_padded_square(healthy, learn, monkeypatch):
    pad = transforms._pad

    def normalised_by_image(image, boxes, side):
        padded = pad(image, boxes, side)
        height, width = padded.valid_size
        padded.boxes = padded.boxes * np.array([side / width, side / height] * 2)
        return padded

    monkeypatch.setattr(transforms, "_pad", normalised_by_image)
    buggy = learn("normalisation")
    assert buggy["data/boxes_in_padding"] > 0.4 > 0 == healthy["data/boxes_in_padding"]
    assert buggy["train/bin_error_y1"] > 1.3 * healthy["train/bin_error_y1"]


def test_the_documentation_names_these_metrics():
    page = Path("docs/what-to-expect.md").read_text()
    for name in ("data/misplaced_tokens", "data/inverted_boxes", "data/supervised_noise", "data/boxes_in_padding"):
        assert f"`{name}`" in page
