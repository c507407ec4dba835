"""The pictures of a run and of a sentence: the worst images are the worst, the strip grows by a step, and the view of
tokens shows the detector's own numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from pix2seq.cli import main
from pix2seq.data import Annotations, EvalDataset, find_split, load_annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation import commands, prediction_image, worst_image
from pix2seq.evaluation import images as images_module
from pix2seq.evaluation.coco_metrics import load_ground_truth
from pix2seq.evaluation.images import WRONG, worst
from pix2seq.evaluation.token_figure import LEAST_BINS, _part, attention_weights, read_again, trace_object
from pix2seq.generation import DecodingOptions, generate_tokens
from pix2seq.models import build_model
from pix2seq.tokenizer import TOKENS_PER_OBJECT
from pix2seq.training.evaluator import TrainingEvaluator
from pix2seq.training.run_folder import MOST_STEPS, RunFolder
from pix2seq.transforms import EvalTransform
from pix2seq.visualization import CAPTION_HEIGHT, CELL, STRIP_COLUMNS, MARGIN, side_by_side
from tests.test_evaluation import ONE_PROCESS

# -- the worst images -------------------------------------------------------------------------------------------------


@pytest.fixture
def annotations(shapes_root) -> Annotations:
    return load_annotations(find_split("val", shapes_root))


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """The images that are read."""
    seen, picture = [], Annotations.picture
    monkeypatch.setattr(Annotations, "picture", lambda self, index: seen.append(index) or picture(self, index))
    return seen


def perfect(annotations: Annotations) -> list[dict]:
    rows = []
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        for (x1, y1, x2, y2), label in zip(*annotations.objects(index), strict=True):
            category_id = annotations.categories.ids[label]
            rows.append(said(image_id, category_id, [x1, y1, x2 - x1, y2 - y1], 0.9))
    return rows


def said(image_id: int, category_id: int, box: list, score: float) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": [float(v) for v in box], "score": score}


def nowhere(image_id: int, score: float) -> dict:
    return said(image_id, 1, [0, 0, 1, 1], score)


def test_the_worst_images_are_those_that_were_planted(annotations):
    ids = annotations.image_ids.tolist()
    rows = [row for row in perfect(annotations) if row["image_id"] != ids[3]]  # all objects of an image are missed
    rows += [nowhere(ids[1], 0.99), nowhere(ids[4], 0.6), nowhere(ids[0], 0.2)]  # the last counts for nothing
    shown = worst(annotations, rows, 8)
    assert shown[0].index == 3
    assert {one.index for one in shown} == {1, 3, 4}
    assert [one.index for one in worst(annotations, rows, 2)] == [3, 1]  # by agreement, then by the surest mistake
    assert [one.index for one in worst(annotations, rows, 1)] == [3]
    by_index = {one.index: one for one in shown}
    assert by_index[3].agreement == 0
    assert not by_index[3].found.any()
    objects = len(by_index[1].found)
    assert by_index[1].agreement == objects / (objects + 1)
    assert by_index[1].surest_mistake == 0.99
    assert by_index[1].found.all()


def test_another_class_is_wrong_a_second_box_is_not(annotations):
    rows = perfect(annotations)
    again = [row | {"score": 0.5} for row in rows]
    assert worst(annotations, rows + again, 8) == []
    other = {a: b for a, b in zip(annotations.categories.ids, np.roll(annotations.categories.ids, 1), strict=True)}
    first = [row | {"category_id": int(other[row["category_id"]])} for row in rows[:1]]
    (one,) = worst(annotations, first + rows[1:], 8)
    assert (~one.found).sum() == (~one.right).sum() == 1


def test_crowds_are_neither_missed_nor_wrong(annotations):
    rows = perfect(annotations)
    crowd = np.zeros(len(annotations.boxes), bool)
    crowd[0] = True
    crowded = replace(annotations, crowd=crowd, trainable=annotations.trainable & ~crowd)
    x, y, width, height = rows[0]["bbox"]
    part = rows[0] | {"bbox": [x, y, width / 3, height / 3]}
    assert worst(crowded, rows[1:] + [part], 8) == []
    assert [one.index for one in worst(annotations, rows[1:] + [part], 8)] == [0]


def test_no_more_images_are_read_than_drawn(annotations, opened):
    assert opened == []
    picture = worst_image(annotations, [], 3)
    assert len(opened) == len(set(opened)) == 3
    assert picture.width == 4 * (CELL + MARGIN) + MARGIN
    opened.clear()
    worst_image(annotations, perfect(annotations), 8)
    assert opened == []


def test_what_is_wrong_is_orange(annotations):
    ids = annotations.image_ids.tolist()
    rows = perfect(annotations) + [nowhere(ids[1], 0.99)]
    orange = (np.asarray(worst_image(annotations, rows, 8)) == ImageColor.getrgb(WRONG)).all(axis=-1)
    middle = orange.shape[1] // 2
    assert not orange[:, :middle].any()
    assert orange[:, middle:].any()


def test_an_image_that_cannot_be_read_is_grey(annotations, monkeypatch):
    def image_file(self, index):
        raise BadImageError("unreadable-file", "it is empty")

    monkeypatch.setattr(Annotations, "image_file", image_file)
    assert worst_image(annotations, [], 1).width == 2 * (CELL + MARGIN) + MARGIN


def test_where_nothing_is_sure_the_pictures_say_so(annotations, monkeypatch):
    grids, names, grid, draw = [], [], images_module.grid, images_module.draw_boxes
    monkeypatch.setattr(images_module, "grid", lambda *args: grids.append(args) or grid(*args))
    monkeypatch.setattr(
        images_module, "draw_boxes", lambda *args, **kwargs: names.append(args[2]) or draw(*args, **kwargs)
    )
    unsure = [row | {"score": 0.2} for row in perfect(annotations)]
    worst_image(annotations, unsure, 1)
    _, titles, _, ((_, words),) = grids.pop()
    assert titles[1] == "predictions from score 0.3 (orange: wrong)"
    assert words == "nothing scored 0.3 or more"
    crowded = replace(annotations, crowd=np.arange(len(annotations.boxes)) == 0)
    crowded.trainable = annotations.trainable & ~crowded.crowd
    worst_image(crowded, perfect(annotations)[:1], len(annotations))
    assert "none wrong" in {row[1] for row in grids.pop()[3]}  # something was sure, of a crowd
    names.clear()
    prediction_image(annotations, unsure, 1)
    assert names[-1] == ["nothing scored 0.3 or more"]
    monkeypatch.setitem(annotations.bad_images, 0, BadImageError("unreadable-file", "it is empty"))
    prediction_image(annotations, [], 1)
    assert names[-1] == ["cannot be read"]


# -- one image over the steps -----------------------------------------------------------------------------------------


def sheet(color: int) -> Image.Image:
    """What is predicted for the third image has this brightness."""
    pairs = [(Image.new("L", (64, 64), 7 if n == 2 else 9), Image.new("L", (64, 64), color)) for n in range(3)]
    return side_by_side([tuple(image.convert("RGB").resize((CELL, CELL)) for image in pair) for pair in pairs])


def cells(folder: RunFolder) -> list[int]:
    """The brightness of each picture of the strip, the ground truth first."""
    pixels = np.asarray(Image.open(folder.path / "samples" / "strip.png"))[..., 0]
    high = CELL + MARGIN + CAPTION_HEIGHT
    middles = [
        pixels[y - CELL // 2, x + CELL // 2]
        for y in range(high, pixels.shape[0], high)
        for x in range(MARGIN, pixels.shape[1], CELL + MARGIN)
    ]
    return [int(value) for value in middles if value != 255]


def sample(folder: RunFolder, step: int) -> None:
    folder.sample("predictions", step, sheet(step))
    folder.strip(step, 2)


def test_the_strip_grows_by_a_step(tmp_path):
    folder = RunFolder(tmp_path, is_main=True)
    for step in (10, 20, 30):
        sample(folder, step)
        assert cells(folder) == [7, *range(10, step + 1, 10)]


def test_the_strip_of_a_resumed_run_has_each_step_once(tmp_path):
    before = RunFolder(tmp_path, is_main=True)
    for step in (10, 20, 30, 40):
        sample(before, step)
    (tmp_path / "samples" / "predictions_00000010.png").write_bytes(b"half of it")
    (tmp_path / "samples" / "predictions_best.png").write_bytes(b"somebody's")
    resumed = RunFolder(tmp_path, is_main=True)
    sample(resumed, 30)  # from a checkpoint at 20
    assert cells(resumed) == [7, 20, 30]
    sample(resumed, 40)
    sample(resumed, 50)
    assert cells(resumed) == [7, 20, 30, 40, 50]


def test_of_many_steps_some_are_shown_the_first_and_the_last_too(tmp_path):
    folder = RunFolder(tmp_path, is_main=True)
    for step in range(10, 40):
        folder.sample("predictions", step, sheet(step))
    folder.strip(39, 2)
    truth, *shown = cells(folder)
    assert (len(shown), shown[0], shown[-1]) == (MOST_STEPS, 10, 39)
    assert {2, 3} >= set(np.diff(shown).tolist())
    assert Image.open(tmp_path / "samples" / "strip.png").width == STRIP_COLUMNS * (CELL + MARGIN) + MARGIN


def test_a_run_draws_both(shapes_root, make_model, annotations, tmp_path):
    data = EvalDataset(annotations, EvalTransform(64))
    truth = load_ground_truth(annotations.split.json)
    options, folder = DecodingOptions(max_objects=2, top_p=0), RunFolder(tmp_path, is_main=True)
    evaluator = TrainingEvaluator(folder, ONE_PROCESS, data, truth, options, 5, 0, False)
    model = make_model(decoder_layers=1)
    for columns, step in enumerate((1, 2), start=2):
        evaluator.sample(model, step)
        assert Image.open(tmp_path / "samples" / "strip.png").width == columns * (CELL + MARGIN) + MARGIN
    evaluator.evaluate(model, 2)
    assert (tmp_path / "eval" / "step_2" / "worst.png").is_file()


# -- an object, token by token ----------------------------------------------------------------------------------------


def detector(decoder: str, **kwargs):
    torch.manual_seed(0)
    return build_model(
        **{"category_ids": (3, 7, 9), "class_names": ("cat", "dog", "eel"), "hidden_size": 16, "encoder_layers": 1},
        **{"decoder_layers": 2, "num_heads": 2, "mlp_size": 32, "image_size": 64, "num_bins": 20, "max_objects": 3},
        backbone="{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
        decoding={"top_p": 0.4, "temperature": 1.0, "seed": 0},
        decoder=decoder,
        **kwargs,
    ).eval()


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(params=["llama", "llama, heads share keys", "llama, causal prefix", "transformer"])
def model(request, make_model):
    if request.param == "llama, heads share keys":
        return make_model(decoder={"num_key_value_heads": 1})
    return detector(request.param.split(",")[0], causal_prefix=request.param.endswith("prefix"))


@pytest.mark.parametrize("number", [1, 3, None])
def test_probabilities_are_those_it_was_written_with(model, number):
    written = trace_object(model, pixels(), number)
    options, tokenizer = model.decoding_options, model.tokenizer
    found = model.detect(pixels(), options)[0]
    index = int(found.scores.argmax()) if number is None else number - 1
    tokens = generate_tokens(model, pixels(), tokenizer, options).tokens[0]
    start, end = TOKENS_PER_OBJECT * index, TOKENS_PER_OBJECT * (index + 1)
    assert (written.number, written.count) == (index + 1, len(found.scores))
    assert written.tokens.tolist() == tokens[start:end].tolist()
    assert (written.label, written.score) == (found.labels[index], found.scores[index])
    # Token by token, as it was written.
    steps, token = model.prefill(pixels(), end), torch.tensor([tokenizer.bos_id])
    with torch.inference_mode():
        logits = []
        for position in range(end):
            logits.append(model.decode_step(token, position, steps)[0])
            token = tokens[position : position + 1]
    np.testing.assert_allclose(written.probabilities, torch.stack(logits[start:]).softmax(-1).numpy(), atol=1e-5)
    assert written.score == pytest.approx(
        written.probabilities[-1, tokenizer.first_class_id : tokenizer.first_bin_id].max(), abs=1e-5
    )


def test_attention_is_what_the_layer_gives(model):
    words = torch.cat([torch.ones(1, 1, dtype=torch.long), torch.randint(5, 20, (1, 9))], dim=1)
    layer = model.decoder.get_decoder().layers[-1]
    attention, called, gave = getattr(layer, "encoder_attn", layer.self_attn), [], []
    attention.register_forward_pre_hook(lambda _, args, kwargs: called.append(kwargs), with_kwargs=True)
    attention.register_forward_hook(lambda _, args, out: gave.append(out[0]))
    _, seen = read_again(model, pixels(), words)
    num_visual = model.encode(pixels()).shape[1]
    is_llama = layer.self_attn is attention
    assert seen.shape == (10, num_visual + 10 * is_llama)
    torch.testing.assert_close(seen.sum(-1), torch.ones(10))
    if is_llama:
        assert not seen[:, num_visual:].triu(1).any()
    # With these weights, values give what the layer gave.
    with torch.inference_mode():
        weights = attention_weights(attention, **called[0])[:, :, -10:]
        source = called[0].get("key_value_states", called[0]["hidden_states"])
        values = attention.v_proj(source).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        mixed = weights @ values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
        again = (attention.o_proj if is_llama else attention.out_proj)(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, gave[0][:, -10:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen, weights[0].mean(0))


def test_a_long_ruler_is_shown_where_the_probability_lies():
    narrow, two = np.zeros(1000), np.zeros(1000)
    narrow[400:410] = 0.1
    two[[100, 900]] = 0.5
    low, high = _part(narrow, 405)
    assert LEAST_BINS - 1 <= high - low <= LEAST_BINS + 1
    assert low < 400 < 410 < high
    low, high = _part(narrow, 995)  # what was written is shown, however unlikely
    assert low <= 400 < 995 < high <= 1000
    low, high = _part(two, 100)
    assert low <= 100 < 900 < high
    assert _part(np.ones(50), 3) == (0, 50)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    detector("transformer").save_pretrained(folder)
    Image.fromarray(np.uint8(np.arange(60 * 40 * 3).reshape(40, 60, 3) % 256)).save(folder / "image.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    return folder


@pytest.mark.parametrize("words", [(), ("--object", "2")])
def test_tokens_draws_a_picture(checkpoint, tmp_path, capsys, words):
    files = ["--checkpoint", str(checkpoint), "--image", str(checkpoint / "image.png")]
    assert main(["tokens", *files, "--output", str(tmp_path / "tokens"), *words]) == 0
    assert Image.open(tmp_path / "tokens").format == "PNG"
    assert f"object {words[1] if words else ''}" in capsys.readouterr().out


def test_tokens_turns_a_picture_as_its_exif_tag_says(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "token_figure", lambda written, canvas, *names: canvas)
    exif, image = Image.Exif(), Image.open(checkpoint / "image.png")
    exif[0x0112] = 6
    image.save(tmp_path / "tagged.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png")
    for name in ("tagged", "turned"):
        files = ["--checkpoint", str(checkpoint), "--image", str(tmp_path / f"{name}.png")]
        assert main(["tokens", *files, "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "tagged").read_bytes() == (tmp_path / "turned").read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"image": None}, "the following arguments are required: --image"),
        ({"image": "nowhere.png"}, "nowhere.png: cannot be read (No such file"),
        ({"image": "."}, "cannot be read (not a regular file"),
        ({"image": "empty.jpg"}, "empty.jpg: cannot be read (the file is empty"),
        ({"image": "text.jpg"}, "text.jpg: cannot be read (not an image"),
        ({"object": "4"}, "--object 4: must be 1 to 3, so many objects were written"),
        ({"object": "0"}, "--object 0: must be 1 to 3"),
        ({"object": "best"}, "--object: invalid int value"),
        ({"checkpoint": "nowhere"}, "--checkpoint nowhere: no such folder"),
        ({"output": "nowhere/tokens.png", "checkpoint": "nowhere"}, "cannot be written (No such file"),
        ({"output": "image.png"}, "--output image.png: would take the place of an input"),
        ({"output": "tokens.jpg"}, "--output tokens.jpg: must end in .png"),
        ({"output": ""}, "cannot be written (Is a directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(checkpoint, monkeypatch, capsys, words, says):
    monkeypatch.chdir(checkpoint)
    words = {"checkpoint": ".", "image": "image.png", "output": "tokens.png"} | words
    words = [word for name, value in words.items() if value is not None for word in (f"--{name}", value)]
    try:
        code = main(["tokens", *words])
    except SystemExit as end:
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (checkpoint / "tokens.png").exists()
