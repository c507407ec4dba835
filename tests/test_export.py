"""Exported graphs write the boxes of the detector they come from."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from pix2seq import export
from pix2seq.data.shapes import CATEGORY_IDS, SHAPES, draw_image
from pix2seq.export import FUNCTIONS, ExportArguments, OnnxDetector
from pix2seq.models import Pix2SeqForObjectDetection, build_model, load_model
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor
from pix2seq.transforms import to_original_pixels
from tests.conftest import TINY_BACKBONE

OBJECTS = 6


def spread(model: Pix2SeqForObjectDetection, seed: int = 0) -> Pix2SeqForObjectDetection:
    """With larger weights in the decoder, or everything would be nearly equally likely."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def new_detector(decoder: str, seed: int = 0, decoder_layers: int = 2) -> Pix2SeqForObjectDetection:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(
            category_ids=CATEGORY_IDS,
            class_names=SHAPES,
            backbone=str(TINY_BACKBONE),
            decoder=decoder,
            hidden_size=16,
            encoder_layers=int(decoder == "llama"),  # exporting a layer takes seconds
            decoder_layers=decoder_layers,
            num_heads=2,
            mlp_size=32,
            image_size=64,
            num_bins=50,
            max_objects=OBJECTS,
            # The classic one says EOS: its sentences have different lengths.
            noise_objects=decoder == "llama",
        )
    model = spread(model, seed)
    if decoder == "transformer":
        model.decoder.lm_head.bias.data[model.tokenizer.eos_id] = 1.0
    return model


@pytest.fixture(scope="module", params=["llama", "transformer"])
def pair(request, tmp_path_factory) -> tuple[Pix2SeqForObjectDetection, Path]:
    """A detector, and the folder it was exported to."""
    folder, layers = tmp_path_factory.mktemp(request.param), {"llama": 2, "transformer": 1}[request.param]
    model = new_detector(request.param, decoder_layers=layers)
    model.save_pretrained(folder / "best")
    assert export.run_export(ExportArguments(str(folder / "best"), str(folder / "onnx"))) == 0
    return load_model(folder / "best", "--checkpoint").eval(), folder / "onnx"


def pictures(count: int = 20) -> torch.Tensor:
    drawn = [draw_image(np.random.default_rng((1, seed)), 64, 4)[0] for seed in range(count)]
    return Pix2SeqImageProcessor(image_size=64)(drawn)["pixel_values"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0.0},
        # Sentences end at different objects, and coordinates lie between bins.
        {
            "noise_patience": 1,
            "noise_threshold": 0.03,
            "expectation_radius": 2,
            "box_score_power": 0.25,
            "max_objects": 4,
        },
    ],
)
@pytest.mark.parametrize("size", [1, 5])
def test_the_boxes_are_the_detectors(pair, size, changes):
    model, folder = pair
    options = replace(model.decoding_options, **changes)
    expected, exported = model.detect(pictures(), options), OnnxDetector(folder)
    found = [each for part in pictures().split(size) for each in exported.detect(part, options)]
    assert len({each.boxes.tobytes() for each in expected}) >= 8
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_array_equal(theirs.labels, ours.labels)
        if changes.get("expectation_radius"):
            np.testing.assert_allclose(theirs.boxes, ours.boxes, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(theirs.boxes, ours.boxes)
        np.testing.assert_allclose(theirs.scores, ours.scores, rtol=0, atol=1e-5)


def test_the_folder_says_what_it_is(pair):
    model, folder = pair
    config = OnnxDetector(folder).config
    assert config.class_names == SHAPES
    assert AutoImageProcessor.from_pretrained(folder).image_size == 64
    text = (folder / "README.md").read_text()
    assert "encoder.onnx: pixel_values (uint8) ('batch', 3, 64, 64)" in text
    assert "boxes of 20 of 20 pictures are the same one at a time, of 20 in batches of 5" in text


def test_rows_may_stand_at_different_places(pair):
    """As a server does that begins with a picture while others are being written about."""
    step = OnnxDetector(pair[1])
    steps = step.prefill(pictures(2), 10)
    ids, logits = np.random.default_rng(0).integers(5, 50, (6, 2)), []
    for position in range(6):
        logits.append(step.decode_step(torch.from_numpy(ids[position]), position, steps).numpy())
    late = step.prefill(pictures(2), 10)
    for position in range(6):  # the second row begins two tokens later, and until then reads what it reads again
        places = np.array([position, max(position - 2, 0)])
        inputs = {"token": ids[places, [0, 1]], "position": places, **vars(late)}
        found, late.said = step.reader.run(None, inputs)
        np.testing.assert_allclose(found[0], logits[position][0], atol=1e-5)
        np.testing.assert_allclose(found[1], logits[places[1]][1], atol=1e-5)


@pytest.mark.parametrize("kind", ["num_key_value_heads", "causal_prefix", "transformer"])
def test_steps_of_all_kinds(make_model, kind):
    """Before they are graphs: queries that share keys, visual tokens that see only those before them, and the classic
    decoder."""
    model = new_detector(kind) if kind == "transformer" else spread(make_model(decoder={kind: 1}))
    encode, step = FUNCTIONS[model.config.decoder_config.model_type]
    ids = torch.randint(5, 50, (7, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        steps, picture = model.prefill(pictures(3), 7), encode(model, pictures(3))
        said = torch.zeros(*picture.shape[:3], 7, picture.shape[4])
        for position, token in enumerate(ids):
            logits, said = step(model, token, torch.full((3,), position), picture, said)
            torch.testing.assert_close(logits, model.decode_step(token, position, steps))


def test_the_programs_of_the_page(pair, tmp_path, monkeypatch, capsys):
    """docs/export.md. The one in NumPy says what the detector says, of a picture that needs no resizing."""
    model, folder = pair
    ours, program = re.findall(r"```python\n(.*?)```", Path("docs/export.md").read_text(), re.DOTALL)
    assert not re.search(r"^(import|from) (torch|transformers|pix2seq)", program, re.MULTILINE)
    shutil.copytree(folder, tmp_path / "runs" / "demo" / "onnx")
    Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(program.replace("image.jpg", "image.png").replace("> 0.5", "> -1"), {})  # all objects, and a lossless file
    lines = capsys.readouterr().out.splitlines()
    exec(ours.replace("image.jpg", "image.png"), found := {})
    assert len(found["found"].scores) <= OBJECTS
    expected = model.detect(pictures(1), replace(model.decoding_options, top_p=0.0))[0]
    boxes = to_original_pixels(expected.boxes, 64, (64, 64), (64, 64))
    assert [line.split()[0] for line in lines] == [SHAPES[label] for label in expected.labels]
    corners = np.array([json.loads(line[line.index("[") :]) for line in lines]).reshape(-1, 4)
    np.testing.assert_allclose(corners, boxes, atol=1e-3)
    np.testing.assert_allclose([float(line.split()[1]) for line in lines], expected.scores, atol=1e-3)


def test_graphs_of_another_detector_are_not_kept(pair, tmp_path, monkeypatch, capsys):
    model, folder = pair
    kind = "llama" if model.config.noise_objects else "transformer"
    layers = model.config.decoder_config.num_hidden_layers
    new_detector(kind, seed=1, decoder_layers=layers).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(
        *(export, "write_graphs"),
        lambda detector, to, opset: [shutil.copy(graph, to) for graph in folder.glob("*.onnx")],
    )
    assert export.run_export(ExportArguments(str(tmp_path / "other"), str(tmp_path / "onnx"))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the graphs do not say what the detector says, and were not kept" in error
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "out"], "--checkpoint: missing"),
        (["--checkpoint", "best"], "--output_dir: missing"),
        (["--checkpoint", "best", "--output_dir", "out", "--opset", "17"], "--opset 17: must lie in 18 ... 25"),
        (["--checkpoint", "nowhere", "--output_dir", "out"], "--checkpoint nowhere: no such folder"),
        (["--checkpoint", "best", "--output_dir", "best"], "--output_dir best: is there already; name a new folder"),
        (["--checkpoint", "best", "--output_dir", "file/out"], "--output_dir file/out: could not be written"),
    ],
)
def test_mistakes_get_one_line(words, message, tmp_path, monkeypatch, capsys):
    new_detector("llama").save_pretrained(tmp_path / "best")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    try:
        code = export.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"export.py: error: {message}")
    assert error.count("\n") == 1


def test_the_extra_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert export.run_export(ExportArguments("best", "out")) == 2
    assert capsys.readouterr().err == (
        "export.py: error: export.py needs onnxscript, which is not installed: pip install -e '.[export]'\n"
    )
