"""predict.py and the Pix2Seq class: any picture there is, the same boxes by every route, and nothing lost."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import evaluate
import pix2seq.predictor
import predict
from pix2seq import Pix2Seq, Pix2SeqImageProcessor
from pix2seq.command_line import parse
from pix2seq.config import EvaluateArguments
from pix2seq.data.images import BadImage
from pix2seq.errors import UserError
from pix2seq.scoring import coco_metrics
from pix2seq.shapes import CATEGORY_IDS, SHAPES


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("detector"), make_model(seed=5)
    with torch.no_grad():  # opinions strong enough to differ from slot to slot
        for parameter in model.parameters():
            parameter *= 3
    model.save_pretrained(folder)
    Pix2SeqImageProcessor.for_detector(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(folder):
    return Pix2Seq.from_pretrained(folder, device="cpu")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURES = {
    "large.jpg": lambda path: photo(300, 170).save(path),  # so large that a loader could decode half of it
    "plain.png": lambda path: photo(70, 50, 1).save(path),
    "grey.jpg": lambda path: photo(64, 90, 2).convert("L").save(path),
    "cmyk.jpg": lambda path: photo(80, 60, 3).convert("CMYK").save(path),
    "turned.jpg": lambda path: photo(90, 40, 4).save(path, exif=turned()),
    "dot.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "wide.png": lambda path: photo(20000, 10, 5).save(path),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, save in PICTURES.items():
        save(folder / name)
    return folder


def run(folder, *words) -> int:
    words = ["--checkpoint", str(folder), "--num_workers", "0", "--device", "cpu", *map(str, words)]
    return predict.run(parse(predict.PredictArguments, words, "predict.py"))


def read(path) -> list[dict]:
    return json.loads(path.read_text())


# -- one answer by all routes ----------------------------------------------------------------------


def test_every_route_gives_the_same_boxes(folder, detector, pictures, tmp_path):
    assert run(folder, pictures, "--threshold", "0", "--output_dir", tmp_path / "out", "--no_pictures") == 0
    rows, images = (read(tmp_path / "out" / f"{name}.json") for name in ("predictions", "images"))
    assert [image["file_name"] for image in images] == [str(pictures / name) for name in sorted(PICTURES)]

    truth = {
        "images": [image | {"file_name": image["file_name"].rpartition("/")[2]} for image in images],
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, SHAPES, strict=True)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    words = ["--val_images", str(pictures), "--val_json", str(tmp_path / "truth.json"), "--num_workers", "0"]
    words += ["--checkpoint", str(folder), "--output_dir", str(tmp_path / "scored"), "--num_pictures", "0"]
    metrics = evaluate.main(parse(EvaluateArguments, words))
    assert coco_metrics(truth, rows)["AP"] == metrics["AP"]  # a COCO results file
    expected = [row for row in read(tmp_path / "scored" / "predictions.json") if row["score"] > 0]

    classes = dict(zip(CATEGORY_IDS, SHAPES, strict=True))
    detect = pipeline("object-detection", model=str(folder), device="cpu")
    for image in images:
        path = image["file_name"]
        wanted = [row for row in expected if row["image_id"] == image["id"]]
        assert wanted
        mine = [row for row in rows if row["file_name"] == path]
        assert [(row["image_id"], row["bbox"]) for row in mine] == [(row["image_id"], row["bbox"]) for row in wanted]
        assert [row["score"] for row in mine] == pytest.approx([row["score"] for row in wanted], abs=1e-5)
        assert [row["category_id"] for row in mine] == [row["category_id"] for row in wanted]
        assert [row["category_name"] for row in mine] == [classes[row["category_id"]] for row in mine]

        boxes = np.array([row["bbox"] for row in wanted])
        boxes[:, 2:] += boxes[:, :2]
        opened = Image.open(path)
        upright = opened.transpose(Image.Transpose.ROTATE_270) if opened.getexif() else opened.convert("RGB")
        for source in (path, opened, np.asarray(upright)):
            found = detector(source, threshold=0)
            np.testing.assert_allclose(found.boxes, boxes, atol=1e-9)
            assert found.names == [row["category_name"] for row in mine]
            assert found.scores.tolist() == pytest.approx([row["score"] for row in wanted], abs=1e-5)
            assert found.size == (image["height"], image["width"])
        answers = detect(path, threshold=0)
        assert [[*answer["box"].values()] for answer in answers] == boxes.astype(int).tolist()
        assert [answer["label"] for answer in answers] == found.names

