import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, pipeline

from pix2seq import Pix2SeqConfig, Pix2SeqForObjectDetection, Pix2SeqImageProcessor, evaluate
from pix2seq.argument_parser import parse
from pix2seq.data.shapes import CATEGORY_IDS
from pix2seq.evaluate import EvaluateArguments
from pix2seq.models import Pix2SeqOutput


@pytest.fixture(params=[True, False], ids=["noise_objects", "eos"])
def model_folder(request, make_model, tmp_path):
    model = make_model(noise_objects=request.param, seed=5)
    with torch.no_grad():  # larger weights give different predictions for each slot
        for parameter in model.parameters():
            parameter *= 3
    model.save_pretrained(tmp_path / "model")
    Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_evaluation_auto_classes_and_pipeline_give_the_same_boxes(model_folder, shapes_root, tmp_path):
    flags = ["--checkpoint", str(model_folder), "--root", str(shapes_root), "--output_dir", str(tmp_path / "out")]
    evaluate.run_evaluation(parse(EvaluateArguments, flags))
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    annotations = json.loads((shapes_root / "annotations" / "instances_val2017.json").read_text())

    detect = pipeline("object-detection", model=str(model_folder))
    processor = AutoImageProcessor.from_pretrained(model_folder)
    model = AutoModelForObjectDetection.from_pretrained(model_folder).eval()
    assert isinstance(AutoConfig.from_pretrained(model_folder), Pix2SeqConfig)
    assert isinstance(model, Pix2SeqForObjectDetection)
    assert isinstance(processor, Pix2SeqImageProcessor)
    for entry in annotations["images"]:
        path = shapes_root / "images" / "val2017" / entry["file_name"]
        expected = [p for p in predictions if p["image_id"] == entry["id"] and p["score"] > 0]
        boxes = np.array([p["bbox"] for p in expected]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]

        image = Image.open(path)
        outputs = model(**processor(image, return_tensors="pt"))
        sizes = [(image.height, image.width)]
        result = processor.post_process_object_detection(outputs, threshold=0, target_sizes=sizes)[0]
        np.testing.assert_allclose(result["boxes"].numpy(), boxes, atol=1e-9)
        assert [CATEGORY_IDS[label] for label in result["labels"]] == [p["category_id"] for p in expected]
        assert result["scores"].numpy() == pytest.approx([p["score"] for p in expected], abs=1e-5)

        detections = detect(str(path), threshold=0)
        assert [d["label"] for d in detections] == [model.config.id2label[int(i)] for i in result["labels"]]
        corners = [[d["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for d in detections]
        assert corners == result["boxes"].int().tolist()
        assert [d["score"] for d in detections] == pytest.approx(result["scores"].tolist(), abs=1e-6)


def test_images_of_different_sizes_in_one_batch(model_folder):
    processor = AutoImageProcessor.from_pretrained(model_folder)
    model = AutoModelForObjectDetection.from_pretrained(model_folder).eval()
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((30, 90), (200, 50), (64, 64))]
    sizes = [(image.height, image.width) for image in images]
    batched = processor.post_process_object_detection(model(**processor(images)), 0, sizes)
    for image, size, result in zip(images, sizes, batched, strict=True):
        single = processor.post_process_object_detection(model(**processor(image)), 0, torch.tensor([size]))[0]
        torch.testing.assert_close(result["boxes"], single["boxes"])
        assert (result["boxes"] <= torch.tensor([*size[::-1], *size[::-1]])).all()
        assert result["scores"].tolist() == sorted(result["scores"].tolist(), reverse=True)


OUTPUTS = Pix2SeqOutput(
    pred_boxes=torch.tensor([[[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1]], [[0, 0, 1, 1], [0, 0, 0, 0]]]).double(),
    pred_labels=torch.tensor([[2, 0], [1, -1]]),
    pred_scores=torch.tensor([[0.9, 0.2], [0.6, 0.0]]),
)


def test_post_process_applies_threshold_and_target_sizes():
    processor = Pix2SeqImageProcessor(image_size=100)
    first, second = processor.post_process_object_detection(OUTPUTS, 0.5, [(50, 200), (200, 100)])
    assert first["boxes"].tolist() == [[0, 0, 100, 50]]  # the image covers the upper quarter at half its size
    assert (first["labels"].tolist(), first["scores"].tolist()) == ([2], pytest.approx([0.9]))
    assert second["boxes"].tolist() == [[0, 0, 100, 200]]  # clipped to the image
    first, second = processor.post_process_object_detection(OUTPUTS, 0)
    assert first["boxes"].tolist() == [[0, 0, 0.5, 0.25], [0.5, 0.5, 1, 1]]
    assert len(second["labels"]) == 1  # label -1 is an empty slot


def test_coco_annotations_become_sequences(make_model):
    model = make_model()
    processor = Pix2SeqImageProcessor.from_model_config(model.config)
    objects = [
        {"bbox": [0, 0, 32, 16], "category_id": CATEGORY_IDS[1], "iscrowd": 0},
        {"bbox": [5, 5, 0, 9], "category_id": CATEGORY_IDS[1]},  # no area
        {"bbox": [5, 5, 9, 9], "category_id": CATEGORY_IDS[2], "iscrowd": 1},
        {"bbox": [64, 32, 64, 32], "category_id": CATEGORY_IDS[3], "area": 2048.0},
    ]
    images = [np.zeros((64, 128, 3), np.uint8), torch.zeros(3, 40, 40, dtype=torch.uint8)]
    annotations = [{"image_id": 1, "annotations": objects}, {"image_id": 2, "annotations": []}]
    batch = processor(images, annotations=annotations)
    assert set(batch) == {"pixel_values", "input_ids", "labels", "token_weights"}
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    boxes, labels = model.tokenizer.decode(batch["labels"][0].numpy())
    assert labels.tolist()[:2] == [1, 3]
    np.testing.assert_allclose(boxes[:2], [[0, 0, 0.25, 0.125], [0.5, 0.25, 1, 0.5]], atol=0.5 / 49)
    assert model(**batch).loss.isfinite()
    single = processor(images[0], annotations=annotations[0])
    assert torch.equal(single["labels"][0], batch["labels"][0])


def test_arguments_of_a_call(tmp_path):
    processor, pixels = Pix2SeqImageProcessor(image_size=64), np.full((16, 32, 3), 200, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = processor(Image.fromarray(pixels))["pixel_values"]
    assert (expected.dtype, expected.shape) == (torch.uint8, (1, 3, 64, 64))
    for same in (str(tmp_path / "image.png"), pixels, torch.from_numpy(pixels).permute(2, 0, 1), pixels[None]):
        assert torch.equal(processor(same)["pixel_values"], expected)
    grayscale = processor(pixels[:, :, 0])["pixel_values"]
    assert torch.equal(grayscale, expected)
    for size in (48, {"height": 48, "width": 48}):
        assert processor(pixels, size=size)["pixel_values"].shape == (1, 3, 48, 48)
    padded = processor(pixels, do_resize=False)["pixel_values"][0]
    assert (padded[:, :16, :32] == 200).all()
    assert (padded[:, 16:] != 200).all()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    normalized = processor(pixels, do_normalize=True)["pixel_values"]
    torch.testing.assert_close(normalized, (expected / 255 - mean) / std)
    assert isinstance(processor(pixels, return_tensors="np")["pixel_values"], np.ndarray)
    assert isinstance(processor(pixels, return_tensors=None)["pixel_values"], list)
    assert processor(torch.zeros(5, 3, 16, 16, dtype=torch.uint8))["pixel_values"].shape == (5, 3, 64, 64)


def test_the_arguments_are_saved(tmp_path):
    Pix2SeqImageProcessor(size=48, do_resize=False, do_normalize=True, category_ids=(3, 7)).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.do_resize, processor.do_normalize) == (48, False, True)
    assert processor.category_ids == [3, 7]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image_size": 64}, TypeError, "image_size"),
        ({"siz": 64}, TypeError, "siz"),
        ({"size": {"height": 64, "width": 32}}, ValueError, "same value"),
        ({"size": {"shortest_edge": 64}}, ValueError, "same value"),
        ({"size": 16, "do_resize": False}, ValueError, "does not fit"),
        ({"do_rescale": True}, ValueError, "do_rescale"),
        ({"do_convert_rgb": False}, ValueError, "RGB"),
        ({"image_mean": [0.5] * 3}, ValueError, "do_normalize"),
        ({"labels_format": "coco"}, ValueError, "labels_format"),
    ],
)
def test_arguments_of_a_call_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Pix2SeqImageProcessor(image_size=64)(np.zeros((16, 32, 3), np.uint8), **arguments)


def test_invalid_images_and_annotations_are_refused():
    processor, image = Pix2SeqImageProcessor(image_size=64), Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"nowhere\.png: no such image file"):
        processor("nowhere.png")
    with pytest.raises(ValueError, match="no images"):
        processor([])
    with pytest.raises(ValueError, match="lacks 'annotations'"):
        processor(image, annotations={"image_id": 1})
    with pytest.raises(ValueError, match="not finite"):
        processor(image, annotations={"image_id": 1, "annotations": [{"bbox": [0, 0, float("nan"), 1]}]})
    with pytest.raises(TypeError, match="do_reszie"):
        Pix2SeqImageProcessor(do_reszie=False)


def test_boxes_of_images_that_were_not_resized():
    processor = Pix2SeqImageProcessor(image_size=100)
    result = processor.post_process_object_detection(OUTPUTS, 0.5, [(50, 80), (50, 80)], do_resize=False)[0]
    assert result["boxes"].tolist() == [[0, 0, 50, 25]]


def test_invalid_arguments_raise():
    processor = Pix2SeqImageProcessor(category_ids=(3, 7))
    image = Image.new("RGB", (8, 8))
    unknown = {"bbox": [0, 0, 4, 4], "category_id": 5}
    with pytest.raises(ValueError, match="category 5 is not one of"):
        processor(image, annotations={"image_id": 1, "annotations": [unknown]})
    with pytest.raises(ValueError, match="2 images, but annotations of 1"):
        processor([image, image], annotations=[{"image_id": 1, "annotations": []}])
    with pytest.raises(ValueError, match="1 target_sizes, but 2 images"):
        processor.post_process_object_detection(OUTPUTS, target_sizes=[(3, 4)])
    with pytest.raises(ValueError, match="contain no boxes"):
        processor.post_process_object_detection(Pix2SeqOutput(loss=torch.tensor(0.0)))
    for array in (np.zeros((4, 4)), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="an image of shape"):
            processor(array)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(mode):
    assert Pix2SeqImageProcessor().process_image(Image.new(mode, (5, 3))).shape == (3, 3, 5)


def test_16_bit_images_are_scaled_to_8_bits():
    levels = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert Pix2SeqImageProcessor().process_image(levels).tolist() == [[[0, 1, 255]]] * 3


def test_push_to_hub_uploads_a_complete_model(model_folder, tmp_path, monkeypatch):
    """The upload is replaced by a copy."""
    copy = tmp_path / "copy"

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        Pix2SeqForObjectDetection.from_pretrained(working_dir).save_pretrained(copy)

    monkeypatch.setattr(Pix2SeqForObjectDetection, "_upload_modified_files", upload)
    repository = SimpleNamespace(repo_id="user/model")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **kwargs: repository)
    model = AutoModelForObjectDetection.from_pretrained(model_folder)
    model.push_to_hub("user/model")
    restored = AutoModelForObjectDetection.from_pretrained(copy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored.parameters(), strict=True))
