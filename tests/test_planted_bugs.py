"""Bugs that leave a run without AP, planted one by one: which metric shows each within a hundred steps.

docs/what-to-expect.md names the same metrics. Every run is a whole one of train.py, on small pictures of shapes.
"""

import json
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

SMALL = [
    *(
        "--backbone",
        "{model_type: resnet, embedding_size: 16, hidden_sizes: [16, 32], depths: [1, 1], layer_type: basic}",
    ),
    *("--decoder", "transformer", "--hidden_size", "64", "--encoder_layers", "0", "--decoder_layers", "2"),
    *("--num_heads", "2", "--mlp_size", "128", "--dropout", "0", "--drop_path", "0"),
    *("--position_embedding", "fine", "--bin_init", "sine", "--image_size", "32", "--num_bins", "32"),
    *("--max_objects", "4", "--scale_max", "1.0", "--batch_size", "16", "--eval_batch_size", "2"),
    *("--num_workers", "0", "--lr", "2e-3", "--warmup_steps", "10", "--max_steps", "100", "--log_every", "50"),
    *("--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"),
]
BY_HEART = ["--overfit", "16", "--flip", "0", "--scale_min", "1.0", "--object_order", "area", "--lr", "5e-3"]


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Trains, and returns the last row of metrics: of steps 51 to 100, or of all steps of a run of fewer than 50."""
    folder = tmp_path_factory.mktemp("planted")
    root = draw_dataset(folder / "shapes", num_train=400, num_val=2, size=32, max_shapes=3, seed=3)

    def run(name: str, *words: str) -> dict[str, float]:
        output = folder / name
        words = [*SMALL, *words, "--root", str(root), "--output_dir", str(output)]
        assert train.run_training(parse(TrainArguments, words)) == 0
        rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if "train/loss" in row][-1]

    return run


@pytest.fixture(scope="module")
def healthy(learn) -> dict[str, float]:
    return learn("healthy")


@pytest.fixture(scope="module")
def by_heart(learn) -> dict[str, float]:
    return learn("by_heart", *BY_HEART)


def test_a_healthy_run_learns_and_has_no_faults(healthy, by_heart):
    assert healthy["train/iou"] > 0.12
    assert healthy["train/bin_error_y2"] < 4 < 32 / 3  # a third of the ruler is chance
    assert healthy["train/acc_noise"] > 0.9
    faults = {name: value for name, value in healthy.items() if name.startswith("data/")}
    assert len(faults) == 4
    assert set(faults.values()) == {0.0}
    assert by_heart["train/bin_error_y1"] < 0.8, "which of its pictures this is, only a look can tell"
    assert by_heart["train/iou"] > 0.9


def test_a_model_that_does_not_look_at_its_pictures(by_heart, learn, monkeypatch):
    """Which of a few images it has, it never knows; all else it has by heart once it has read a y1."""
    original = Pix2SeqForObjectDetection.forward

    def forward(self, pixel_values, *inputs, **named):
        return original(self, torch.zeros_like(pixel_values), *inputs, **named)

    monkeypatch.setattr(Pix2SeqForObjectDetection, "forward", forward)
    sick = learn("blind", *BY_HEART)
    assert sick["train/bin_error_y1"] > 1.2 > 0.8 > by_heart["train/bin_error_y1"]
    assert sick["train/iou"] < 0.85 < 0.9 < by_heart["train/iou"]
    assert sick["train/bin_error_y2"] < 0.3, "all that there is to learn without a look, it has learnt"
    assert {sick[name] for name in sick if name.startswith("data/")} == {0.0}


def edit_sentence(monkeypatch, edit) -> None:
    original = SequenceBuilder.__call__
    monkeypatch.setattr(SequenceBuilder, "__call__", lambda self, *inputs: edit(original(self, *inputs)))


@pytest.mark.parametrize("by", [1, -1], ids=["late", "early"])
def test_labels_shifted_by_one_token(healthy, learn, monkeypatch, by):
    edit_sentence(monkeypatch, lambda sentence: sentence | {"labels": np.roll(sentence["labels"], by)})
    sick = learn(f"shifted{by}", *(() if by > 0 else ("--max_steps", "5")))
    assert sick["data/misplaced_tokens"] > 0.4 > 0 == healthy["data/misplaced_tokens"]
    if by > 0:  # the answer is what has just been read
        assert sick["train/acc_x1"] > 0.95 > 0.3 > healthy["train/acc_x1"]


def test_boxes_in_xywh_read_as_xyxy_by_the_sentence(healthy, learn, monkeypatch):
    original = SequenceBuilder.__call__

    def build(self, boxes, *inputs):
        return original(self, np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), *inputs)

    monkeypatch.setattr(SequenceBuilder, "__call__", build)
    sick = learn("xywh")
    assert sick["data/inverted_boxes"] > 0.5 > 0 == healthy["data/inverted_boxes"]
    assert sick["train/iou"] < 0.5 * healthy["train/iou"]


def test_boxes_in_xywh_read_as_xyxy_by_the_augmentation(healthy, learn, monkeypatch):
    """It drops boxes without area, so fewer objects are left than the log says that there are."""
    original = Annotations.objects

    def objects(self, index):
        boxes, labels = original(self, index)
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), labels

    monkeypatch.setattr(Annotations, "objects", objects)
    sick = learn("xywh_early")
    assert sick["train/noise_true"] > healthy["train/noise_true"] + 0.2
    assert sick["train/iou"] < 0.5 * healthy["train/iou"]


def test_coordinates_of_noise_supervised(healthy, learn, monkeypatch):
    edit_sentence(monkeypatch, lambda sentence: sentence | {"token_weights": np.ones_like(sentence["token_weights"])})
    sick = learn("noise")
    assert sick["data/supervised_noise"] == pytest.approx(sick["train/noise_true"])
    assert sick["data/supervised_noise"] > 0.4 > 0 == healthy["data/supervised_noise"]
    assert sick["train/bin_error_y1"] > 1.15 * healthy["train/bin_error_y1"]


def test_boxes_normalised_by_the_picture_not_the_canvas(healthy, learn, monkeypatch):
    pad = transforms._pad

    def wrong(pixels, boxes, side):
        canvas = pad(pixels, boxes, side)
        height, width = canvas.valid_size
        canvas.boxes = canvas.boxes * np.array([side / width, side / height] * 2)
        return canvas

    monkeypatch.setattr(transforms, "_pad", wrong)
    sick = learn("canvas")
    assert sick["data/boxes_in_padding"] > 0.4 > 0 == healthy["data/boxes_in_padding"]
    assert sick["train/bin_error_y1"] > 1.3 * healthy["train/bin_error_y1"]


def test_the_page_names_these_metrics():
    page = Path("docs/what-to-expect.md").read_text()
    for name in ("data/misplaced_tokens", "data/inverted_boxes", "data/supervised_noise", "data/boxes_in_padding"):
        assert f"`{name}`" in page
