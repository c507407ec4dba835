"""Images of predictions, of the worst images, of one image over training, and of the tokens of an object."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from pix2seq.cli import main
from pix2seq.data import Annotations, EvalDataset, find_split, load_annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation import commands, prediction_image, worst_image
from pix2seq.evaluation.coco_metrics import load_ground_truth
from pix2seq.evaluation.images import find_worst
from pix2seq.evaluation.token_figure import (
    MIN_BINS,
    attention_weights,
    logits_and_attention,
    probable_range,
    trace_object,
)
from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.models import build_model
from pix2seq.tokenizer import TOKENS_PER_OBJECT
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


# -- tokens of an object ---------------------------------------------------------------------------


def small_model(decoder: str, **kwargs):
    torch.manual_seed(0)
    return build_model(
        backbone="{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
        decoder=decoder,
        decoder_layers=2,
        hidden_size=16,
        encoder_layers=1,
        num_heads=2,
        mlp_size=32,
        image_size=64,
        num_bins=20,
        max_objects=3,
        category_ids=(3, 7, 9),
        class_names=("cat", "dog", "eel"),
        decoding={"top_p": 0.4, "temperature": 1.0, "seed": 0},
        **kwargs,
    ).eval()


@pytest.fixture(params=["llama", "llama, grouped-query attention", "llama, causal prefix", "transformer"])
def model(request, make_model):
    if request.param == "llama, grouped-query attention":
        return make_model(decoder={"num_key_value_heads": 1})
    return small_model(request.param.split(",")[0], causal_prefix=request.param.endswith("prefix"))


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("number", [1, 3, None])
def test_traced_object_has_the_probabilities_of_decoding(model, pixel_values, number):
    traced = trace_object(model, pixel_values, number)
    tokenizer = model.tokenizer
    detections = model.detect(pixel_values)[0]
    index = int(detections.scores.argmax()) if number is None else number - 1
    tokens = generate_tokens(model, pixel_values, tokenizer, model.decoding_options).tokens[0]
    start, end = TOKENS_PER_OBJECT * index, TOKENS_PER_OBJECT * (index + 1)
    assert (traced.number, traced.count) == (index + 1, len(detections.scores))
    assert traced.tokens.tolist() == tokens[start:end].tolist()
    assert (traced.label, traced.score) == (detections.labels[index], detections.scores[index])
    decoder_state, token, logits = model.prefill(pixel_values, end), torch.tensor([tokenizer.bos_id]), []
    with torch.inference_mode():
        for position in range(end):
            logits.append(model.decode_step(token, position, decoder_state)[0])
            token = tokens[position : position + 1]
    np.testing.assert_allclose(traced.probabilities, torch.stack(logits[start:]).softmax(-1).numpy(), atol=1e-5)
    class_probabilities = traced.probabilities[-1, tokenizer.first_class_id : tokenizer.first_bin_id]
    assert traced.score == pytest.approx(class_probabilities.max(), abs=1e-5)


def test_attention_weights_reproduce_the_output_of_the_layer(model, pixel_values):
    input_ids = torch.cat([torch.ones(1, 1, dtype=torch.long), torch.randint(5, 20, (1, 9))], dim=1)
    layer = model.decoder.get_decoder().layers[-1]
    attention, inputs, outputs = getattr(layer, "encoder_attn", layer.self_attn), [], []
    attention.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(kwargs), with_kwargs=True)
    attention.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    _, weights = logits_and_attention(model, pixel_values, input_ids)
    num_visual = model.encode(pixel_values).shape[1]
    is_llama = layer.self_attn is attention
    assert weights.shape == (10, num_visual + 10 * is_llama)
    torch.testing.assert_close(weights.sum(-1), torch.ones(10))
    assert not weights[:, num_visual:].triu(1).any()
    with torch.inference_mode():
        per_head = attention_weights(attention, **inputs[0])[:, :, -10:]
        source = inputs[0].get("key_value_states", inputs[0]["hidden_states"])
        values = attention.v_proj(source).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        mixed = per_head @ values.repeat_interleave(per_head.shape[1] // values.shape[1], dim=1)
        output = (attention.o_proj if is_llama else attention.out_proj)(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, outputs[0][:, -10:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights, per_head[0].mean(0))


def test_probable_range_holds_the_probability_and_the_generated_bin():
    narrow, two_peaks = np.zeros(1000), np.zeros(1000)
    narrow[400:410] = 0.1
    two_peaks[[100, 900]] = 0.5
    low, high = probable_range(narrow, 405)
    assert MIN_BINS - 1 <= high - low <= MIN_BINS + 1
    assert low < 400 < 410 < high
    low, high = probable_range(narrow, 995)
    assert low <= 400 < 995 < high <= 1000
    low, high = probable_range(two_peaks, 100)
    assert low <= 100 < 900 < high
    assert probable_range(np.ones(50), 3) == (0, 50)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model("transformer").save_pretrained(folder)
    Image.fromarray(np.uint8(np.arange(60 * 40 * 3).reshape(40, 60, 3) % 256)).save(folder / "image.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    return folder


@pytest.mark.parametrize("words", [(), ("--object", "2")])
def test_tokens_command_writes_a_png(checkpoint, tmp_path, capsys, words):
    files = ["--checkpoint", str(checkpoint), "--image", str(checkpoint / "image.png")]
    assert main(["tokens", *files, "--output", str(tmp_path / "tokens"), *words]) == 0
    assert Image.open(tmp_path / "tokens").format == "PNG"
    assert f"object {words[1] if words else ''}" in capsys.readouterr().out


def test_tokens_command_applies_the_exif_orientation(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "token_figure", lambda traced, image, *names: image)
    exif, image = Image.Exif(), Image.open(checkpoint / "image.png")
    exif[0x0112] = 6
    image.save(tmp_path / "tagged.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "rotated.png")
    for name in ("tagged", "rotated"):
        files = ["--checkpoint", str(checkpoint), "--image", str(tmp_path / f"{name}.png")]
        assert main(["tokens", *files, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "tagged").read_bytes() == (tmp_path / "rotated").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"image": None}, "--image"),
        ({"image": "nowhere.png"}, "--image nowhere.png: cannot be read"),
        ({"image": "."}, "--image .: cannot be read"),
        ({"image": "empty.jpg"}, "--image empty.jpg: cannot be read"),
        ({"image": "text.jpg"}, "--image text.jpg: cannot be read"),
        ({"object": "4"}, "--object 4: must be 1 to 3"),
        ({"object": "0"}, "--object 0: must be 1 to 3"),
        ({"object": "best"}, "--object"),
        ({"checkpoint": "nowhere"}, "--checkpoint nowhere"),
        ({"output": "nowhere/tokens.png", "checkpoint": "nowhere"}, "--output nowhere/tokens.png: cannot be written"),
        ({"output": "image.png"}, "--output image.png: would overwrite an input"),
        ({"output": "tokens.jpg"}, "--output tokens.jpg: must end in .png"),
        ({"output": ""}, "--output"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(checkpoint, monkeypatch, capsys, words, message):
    monkeypatch.chdir(checkpoint)
    words = {"checkpoint": ".", "image": "image.png", "output": "tokens.png"} | words
    try:
        code = main(["tokens", *(w for name, v in words.items() if v is not None for w in (f"--{name}", v))])
    except SystemExit as stopped:
        code = stopped.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert message in line
    assert not (checkpoint / "tokens.png").exists()
