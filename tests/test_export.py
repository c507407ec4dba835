"""An exported model detects the same objects as the model."""

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
from pix2seq.inference import onnx_graphs
from pix2seq.inference.onnx import OnnxDetector
from pix2seq.models import Pix2SeqForObjectDetection, build_model, load_model
from pix2seq.models.image_processing_pix2seq import Pix2SeqImageProcessor
from pix2seq.transforms import to_original_pixels
from tests.conftest import TINY_BACKBONE


def enlarge_weights(model: Pix2SeqForObjectDetection, seed: int = 0) -> Pix2SeqForObjectDetection:
    """Without large weights in the decoder, all tokens would be almost equally probable."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def new_model(decoder: str, seed: int = 0, decoder_layers: int = 2) -> Pix2SeqForObjectDetection:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(
            category_ids=CATEGORY_IDS,
            class_names=SHAPES,
            backbone=str(TINY_BACKBONE),
            decoder=decoder,
            hidden_size=16,
            encoder_layers=int(decoder == "llama"),  # each layer takes seconds to export
            decoder_layers=decoder_layers,
            num_heads=2,
            mlp_size=32,
            image_size=64,
            num_bins=50,
            max_objects=6,
            noise_objects=decoder == "llama",  # the other decoder predicts EOS, so its sequences differ in length
        )
    model = enlarge_weights(model, seed)
    if decoder == "transformer":
        model.decoder.lm_head.bias.data[model.tokenizer.eos_id] = 1.0
    return model


@pytest.fixture(scope="module", params=["llama", "transformer"])
def exported(request, tmp_path_factory) -> tuple[Pix2SeqForObjectDetection, Path]:
    """A model and the folder it was exported to."""
    folder, layers = tmp_path_factory.mktemp(request.param), {"llama": 2, "transformer": 1}[request.param]
    new_model(request.param, seed=2, decoder_layers=layers).save_pretrained(folder / "best")
    assert export.main(["--checkpoint", str(folder / "best"), "--output_dir", str(folder / "onnx")]) == 0
    return load_model(folder / "best", "--checkpoint").eval(), folder / "onnx"


def pixel_values(count: int = 20) -> torch.Tensor:
    images = [draw_image(np.random.default_rng((1, seed)), 64, 4)[0] for seed in range(count)]
    return Pix2SeqImageProcessor(image_size=64)(images)["pixel_values"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0.0},
        {
            "noise_patience": 1,  # sequences have different lengths
            "noise_threshold": 0.03,
            "expectation_radius": 2,  # coordinates lie between bins
            "box_score_power": 0.25,
            "max_objects": 4,
        },
    ],
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_exported_model_detects_the_same_objects(exported, batch_size, changes):
    model, folder = exported
    options = replace(model.decoding_options, **changes)
    expected, detector = model.detect(pixel_values(), options), OnnxDetector(folder)
    actual = [image for batch in pixel_values().split(batch_size) for image in detector.detect(batch, options)]
    assert len({detections.boxes.tobytes() for detections in expected}) >= 8
    for ours, theirs in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(theirs.labels, ours.labels)
        np.testing.assert_allclose(theirs.boxes, ours.boxes, rtol=0, atol=1e-6 * bool(options.expectation_radius))
        np.testing.assert_allclose(theirs.scores, ours.scores, rtol=0, atol=1e-5)


def test_graphs_of_another_version_are_an_error(exported, tmp_path):
    import onnx

    shutil.copytree(exported[1], tmp_path, dirs_exist_ok=True)
    graph = onnx.load(tmp_path / "decoder_step.onnx")
    next(tensor for tensor in graph.graph.input if tensor.name == "past_tokens").name = "tokens"
    for node in graph.graph.node:
        node.input[:] = ["tokens" if name == "past_tokens" else name for name in node.input]
    (tmp_path / "decoder_step.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ValueError, match="has no input past_tokens: it is of another version; export the model again"):
        OnnxDetector(tmp_path)


def test_the_folder_loads_as_config_and_image_processor(exported):
    assert OnnxDetector(exported[1]).config.class_names == SHAPES
    assert AutoImageProcessor.from_pretrained(exported[1]).image_size == 64


def test_rows_may_be_at_different_positions(exported):
    """A server can add an image to a batch while others are being decoded."""
    detector = OnnxDetector(exported[1])
    state = detector.prefill(pixel_values(2), 10)
    ids = np.random.default_rng(0).integers(5, 50, (6, 2))
    logits = [detector.decode_step(torch.from_numpy(ids[position]), position, state).numpy() for position in range(6)]
    state = detector.prefill(pixel_values(2), 10)
    for position in range(6):  # the second row starts two tokens later
        positions = np.array([position, max(position - 2, 0)])
        if position == 2:
            state.past_tokens[1] = 0
        inputs = {"input_ids": ids[positions, [0, 1]], "position": positions, **vars(state)}
        row_logits, state.past_key_values, state.past_tokens, state.past_coverage = detector.step.run(None, inputs)
        np.testing.assert_allclose(row_logits[0], logits[position][0], atol=1e-5)
        np.testing.assert_allclose(row_logits[1], logits[positions[1]][1], atol=1e-5)


@pytest.mark.parametrize("decoder", ["num_key_value_heads", "causal_prefix", "transformer"])
def test_graph_functions_match_the_incremental_decoder(make_model, decoder):
    model = new_model(decoder) if decoder == "transformer" else enlarge_weights(make_model(decoder={decoder: 1}))
    ids = torch.randint(5, 50, (7, 3), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        state, visual_key_values = model.prefill(pixel_values(3), 7), onnx_graphs.encode(model, pixel_values(3))
        past = [
            torch.zeros(*visual_key_values.shape[:3], 7, visual_key_values.shape[4]),
            torch.zeros(3, 5, dtype=torch.long),
            torch.zeros(3, visual_key_values.shape[3]),
        ]
        for position, input_ids in enumerate(ids):
            positions = torch.full((3,), position)
            logits, *past = onnx_graphs.decode_step(model, input_ids, positions, visual_key_values, *past)
            torch.testing.assert_close(logits, model.decode_step(input_ids, position, state))


def test_the_programs_of_the_documentation(exported, tmp_path, monkeypatch, capsys):
    model, folder = exported
    with_package, in_numpy = re.findall(r"```python\n(.*?)```", Path("docs/export.md").read_text(), re.DOTALL)
    assert not re.search(r"^(import|from) (torch|transformers|pix2seq)", in_numpy, re.MULTILINE)
    shutil.copytree(folder, tmp_path / "runs" / "demo" / "onnx")
    # A lossless image that needs no resizing.
    Image.fromarray(pixel_values(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(with_package.replace("image.jpg", "image.png"), {})
    assert capsys.readouterr().out
    exec(in_numpy.replace("image.jpg", "image.png").replace("> 0.5", "> -1"), {})
    lines = capsys.readouterr().out.splitlines()
    expected = model.detect(pixel_values(1), replace(model.decoding_options, top_p=0.0))[0]
    boxes = to_original_pixels(expected.boxes, 64, (64, 64), (64, 64))
    assert [line.split()[0] for line in lines] == [SHAPES[label] for label in expected.labels]
    corners = np.array([json.loads(line[line.index("[") :]) for line in lines]).reshape(-1, 4)
    np.testing.assert_allclose(corners, boxes, atol=1e-3)
    np.testing.assert_allclose([float(line.split()[1]) for line in lines], expected.scores, atol=1e-3)


def test_graphs_of_another_model_are_deleted(exported, tmp_path, monkeypatch, capsys):
    model, folder = exported
    decoder = "llama" if model.config.noise_objects else "transformer"
    layers = model.config.decoder_config.num_hidden_layers
    new_model(decoder, seed=1, decoder_layers=layers).save_pretrained(tmp_path / "other")

    def copy_graphs(model, to, opset):
        for graph in folder.glob("*.onnx"):
            shutil.copy(graph, to)

    monkeypatch.setattr(onnx_graphs, "export_graphs", copy_graphs)
    assert export.main(["--checkpoint", str(tmp_path / "other"), "--output_dir", str(tmp_path / "onnx")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the exported model differs from the model and was deleted" in error
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "out"], "--checkpoint: missing"),
        (["--checkpoint", "best"], "--output_dir: missing"),
        (["--checkpoint", "best", "--output_dir", "out", "--opset", "17"], "--opset 17: must be 18 to 25"),
        (["--checkpoint", "nowhere", "--output_dir", "out"], "--checkpoint nowhere: no such folder"),
        (["--checkpoint", "best", "--output_dir", "best"], "--output_dir best: exists"),
        (["--checkpoint", "best", "--output_dir", "file/out"], "--output_dir file/out: cannot be written to"),
    ],
)
def test_mistakes_get_one_line(words, message, tmp_path, monkeypatch, capsys):
    new_model("llama").save_pretrained(tmp_path / "best")
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


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert export.main(["--checkpoint", "best", "--output_dir", "out"]) == 2
    assert "onnxscript: pip install" in capsys.readouterr().err
