"""Tests that need a GPU: `make test-gpu`."""

import signal

import numpy as np
import pytest
import torch

from pix2seq.generation import DecodingOptions, generate
from pix2seq.models import Detections
from tests.runs import assert_same_run, interrupt_at, read_json, run
from tests.test_architectures import build, images, scale_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_IMAGES, MIN_EQUAL = 40, 36  # sequences may differ where two tokens are equally probable except for rounding


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Accelerate stores the precision once per process."""
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def num_equal(actual: list[Detections], expected: list[Detections]) -> int:
    return sum(np.array_equal(a.boxes, b.boxes) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("decoder", ["llama", "transformer"])
def test_resume_is_bit_exact(shapes_root, tmp_path, monkeypatch, precision, decoder):
    words = ("--deterministic", "--mixed_precision", precision, "--decoder", decoder, "--max_grad_norm", "1")
    assert run(shapes_root, tmp_path / "whole", *words) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGTERM)
        assert run(shapes_root, tmp_path / "resumed", *words) == 75
    assert run(shapes_root, tmp_path / "resumed", *words, "--resume", "auto") == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_compiled_run_trains_and_evaluates(shapes_root, tmp_path):
    words = ("--compile", "--mixed_precision", "bf16", "--batch_norm", "frozen")
    assert run(shapes_root, tmp_path / "out", *words) == 0
    assert read_json(tmp_path / "out", "status.json")["state"] == "finished"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_objects", [True, False])
@pytest.mark.parametrize("decoder", ["llama", "transformer"])
def test_cuda_graphs_equal_single_steps(monkeypatch, decoder, noise_objects, dtype):
    model = scale_weights(build(decoder, noise_objects=noise_objects, max_objects=6).eval(), 0.3)
    if decoder == "transformer" and not noise_objects:
        with torch.no_grad():
            model.decoder.lm_head.bias[model.tokenizer.eos_id] = 3.0
    options = DecodingOptions(
        max_objects=6,
        top_p=0.9,
        noise_patience=1 if noise_objects else 0,
        noise_threshold=0.1 if decoder == "llama" else 0.02,
    )
    model, pixel_values = model.cuda(), images(NUM_IMAGES).cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        actual = model.detect(pixel_values, options)
        monkeypatch.setattr(generate, "decode_by_object", generate.decode_by_token)
        expected = model.detect(pixel_values, options)
    assert num_equal(actual, expected) >= MIN_EQUAL
    assert len({len(detections.boxes) for detections in actual}) > 3  # the batch has shrunk


def test_memory_of_cuda_graphs_is_released(make_model):
    model, reserved = scale_weights(make_model(max_objects=6), 0.3).cuda(), []
    for _ in range(5):
        model.detect(images(NUM_IMAGES).cuda(), DecodingOptions(6, top_p=0.4))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[1]


def test_detections_on_a_gpu_equal_those_on_a_cpu(make_model):
    model, options = scale_weights(make_model(max_objects=6), 0.3), DecodingOptions(6, top_p=0)
    expected = model.detect(images(NUM_IMAGES), options)
    assert num_equal(model.cuda().detect(images(NUM_IMAGES).cuda(), options), expected) >= MIN_EQUAL
