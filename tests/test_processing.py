"""The ways to ask a detector: evaluate.py, Auto classes, pipeline. One answer."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, pipeline

import pix2seq
from pix2seq import Pix2SeqForObjectDetection, Pix2SeqImageProcessor, evaluate
from pix2seq.argument_parser import parse
from pix2seq.data.shapes import CATEGORY_IDS, SHAPES
from pix2seq.evaluate import EvaluateArguments
from pix2seq.models import Pix2SeqOutput
from pix2seq.models.image_processing_pix2seq import to_rgb_tensor


@pytest.fixture(params=[True, False], ids=["noise_objects", "eos"])
def folder(request, make_model, tmp_path):
    model = make_model(noise_objects=request.param, seed=5)
    with torch.no_grad():  # opinions strong enough to differ from slot to slot
        for parameter in model.parameters():
            parameter *= 3
    model.save_pretrained(tmp_path / "detector")
    Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def test_every_route_gives_the_same_boxes(folder, shapes_root, tmp_path):
    words = ["--checkpoint", str(folder), "--root", str(shapes_root), "--output_dir", str(tmp_path / "out")]
    evaluate.run_evaluation(parse(EvaluateArguments, words))
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    annotations = json.loads((shapes_root / "annotations" / "instances_val2017.json").read_text())

    detect = pipeline("object-detection", model=str(folder))
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    assert isinstance(model, Pix2SeqForObjectDetection)
    assert isinstance(processor, Pix2SeqImageProcessor)
    for image in annotations["images"]:
        path = shapes_root / "images" / "val2017" / image["file_name"]
        expected = [row for row in rows if row["image_id"] == image["id"] and row["score"] > 0]

        picture = Image.open(path)
        outputs = model(**processor(picture, return_tensors="pt"))
        sizes = [(picture.height, picture.width)]
        found = processor.post_process_object_detection(outputs, threshold=0, target_sizes=sizes)[0]
        boxes = np.array([row["bbox"] for row in expected]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(found["boxes"].numpy(), boxes, atol=1e-9)
        assert [CATEGORY_IDS[label] for label in found["labels"]] == [row["category_id"] for row in expected]
        assert found["scores"].numpy() == pytest.approx([row["score"] for row in expected], abs=1e-5)

        answers = detect(str(path), threshold=0)
        assert [answer["label"] for answer in answers] == [model.config.id2label[int(i)] for i in found["labels"]]
        corners = [[answer["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for answer in answers]
        assert corners == found["boxes"].int().tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(found["scores"].tolist(), abs=1e-6)


def test_pictures_of_any_shape_in_one_batch_come_back_in_their_own_pixels(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((30, 90), (200, 50), (64, 64))]
    sizes = [(picture.height, picture.width) for picture in pictures]
    together = processor.post_process_object_detection(model(**processor(pictures)), 0, sizes)
    for picture, size, found in zip(pictures, sizes, together, strict=True):
        alone = processor.post_process_object_detection(model(**processor(picture)), 0, torch.tensor([size]))[0]
        torch.testing.assert_close(found["boxes"], alone["boxes"])
        assert (found["boxes"][:, 0::2] <= size[1]).all()
        assert (found["boxes"][:, 1::2] <= size[0]).all()
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def outputs() -> Pix2SeqOutput:
    return Pix2SeqOutput(
        pred_boxes=torch.tensor([[[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1]], [[0, 0, 1, 1], [0, 0, 0, 0]]]).double(),
        pred_labels=torch.tensor([[2, 0], [1, -1]]),
        pred_scores=torch.tensor([[0.9, 0.2], [0.6, 0.0]]),
    )


def test_thresholds_sizes_and_empty_slots():
    processor = Pix2SeqImageProcessor(image_size=100)
    first, second = processor.post_process_object_detection(outputs(), 0.5, [(50, 200), (200, 100)])
    # A picture 200 wide and 50 high covers the upper quarter of the canvas, at half its size.
    assert first["boxes"].tolist() == [[0, 0, 100, 50]]
    assert (first["labels"].tolist(), first["scores"].tolist()) == ([2], pytest.approx([0.9]))
    assert second["boxes"].tolist() == [[0, 0, 100, 200]]  # clipped to the picture
    first, second = processor.post_process_object_detection(outputs(), 0)
    assert first["boxes"].tolist() == [[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1]]
    assert len(second["labels"]) == 1


def test_sizes_must_be_as_many_as_pictures():
    with pytest.raises(ValueError, match="1 target_sizes, but 2 images"):
        Pix2SeqImageProcessor().post_process_object_detection(outputs(), target_sizes=[(3, 4)])
    with pytest.raises(ValueError, match="pixel_values only"):
        Pix2SeqImageProcessor().post_process_object_detection(Pix2SeqOutput(loss=torch.tensor(0.0)))


def test_coco_annotations_become_sentences(make_model):
    model = make_model()
    processor = Pix2SeqImageProcessor.from_model_config(model.config)
    rows = [
        {"bbox": [0, 0, 32, 16], "category_id": CATEGORY_IDS[1], "iscrowd": 0},
        {"bbox": [5, 5, 0, 9], "category_id": CATEGORY_IDS[1]},  # no area
        {"bbox": [5, 5, 9, 9], "category_id": CATEGORY_IDS[2], "iscrowd": 1},
        {"bbox": [64, 32, 64, 32], "category_id": CATEGORY_IDS[3], "area": 2048.0},
    ]
    pictures = [np.zeros((64, 128, 3), np.uint8), torch.zeros(3, 40, 40, dtype=torch.uint8)]
    batch = processor(pictures, annotations=[{"image_id": 1, "annotations": rows}, {"image_id": 2, "annotations": []}])
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    boxes, labels = model.tokenizer.decode(batch["labels"][0].numpy())
    assert labels.tolist()[:2] == [1, 3]
    np.testing.assert_allclose(boxes[:2], [[0, 0, 0.25, 0.125], [0.5, 0.25, 1, 0.5]], atol=0.5 / 49)
    assert model(**batch).loss.isfinite()
    assert set(batch) == {"pixel_values", "input_ids", "labels", "token_weights"}
    single = processor(pictures[0], annotations={"image_id": 1, "annotations": rows})
    assert single["labels"].shape == (1, batch["labels"].shape[1])


def test_annotations_that_do_not_fit_are_refused():
    processor = Pix2SeqImageProcessor(category_ids=(3, 7))
    picture = Image.new("RGB", (8, 8))
    row = {"bbox": [0, 0, 4, 4], "category_id": 5}
    with pytest.raises(ValueError, match="category 5 is not one of"):
        processor(picture, annotations={"image_id": 1, "annotations": [row]})
    with pytest.raises(ValueError, match="2 images, but annotations of 1"):
        processor([picture, picture], annotations=[{"image_id": 1, "annotations": []}])
    with pytest.raises(ValueError, match="'np'"):
        processor(picture, return_tensors="np")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_any_mode(mode):
    assert to_rgb_tensor(Image.new(mode, (5, 3))).shape == (3, 3, 5)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 3), np.float32), np.zeros((2, 4, 4, 3), np.uint8)])
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError, match="an image of shape"):
        to_rgb_tensor(bad)


def test_16_bits_are_scaled_to_8():
    levels = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert to_rgb_tensor(levels).tolist() == [[[0, 1, 255]]] * 3


def test_the_config_is_known_to_transformers(folder):
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, pix2seq.Pix2SeqConfig)
    assert config.class_names == tuple(SHAPES)


def test_what_would_be_pushed_to_the_hub_can_be_loaded_from_it(folder, tmp_path, monkeypatch):
    """push_to_hub is save_pretrained and an upload; the upload is stood in for by a copy."""
    uploaded = {}

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploaded.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})

    monkeypatch.setattr(Pix2SeqForObjectDetection, "_upload_modified_files", upload)
    created = SimpleNamespace(repo_id="someone/detector")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: created)
    model = AutoModelForObjectDetection.from_pretrained(folder)
    model.push_to_hub("someone/detector")
    for name, data in uploaded.items():
        (tmp_path / name).write_bytes(data)
    restored = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored.parameters(), strict=True))
