"""What only a GPU can show: `make test-gpu`. Sizes stay small; nothing is downloaded."""

import json
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pix2seq import train
from pix2seq.generation import DecodingOptions
from pix2seq.generation import generate as generate_module
from tests.test_architectures import build
from tests.runs import arguments, interrupt_at, rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Precision is part of Accelerate's state, of which a process has one."""
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def spread(model):
    """The model with weights that do not make everything nearly equally likely."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def ending(decoder: str, noise_objects: bool):
    """A model whose sentences end early, some sooner than others, and how it is to write them."""
    model = spread(build(decoder, noise_objects=noise_objects, max_objects=6).eval())
    if decoder == "transformer" and not noise_objects:
        with torch.no_grad():
            model.decoder.lm_head.bias[model.tokenizer.eos_id] = 3.0
    score = 0.1 if decoder == "llama" else 0.02
    return model, DecodingOptions(6, top_p=0.9, noise_patience=1 if noise_objects else 0, noise_threshold=score)


def some_pictures() -> torch.Tensor:
    return torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("decoder", ["llama", "transformer"])
def test_a_deterministic_run_resumes_to_the_bit(shapes_root, tmp_path, monkeypatch, precision, decoder):
    words = ("--deterministic", "--mixed_precision", precision, "--decoder", decoder, "--max_grad_norm", "1")
    assert train.run_training(arguments(shapes_root, tmp_path / "whole", *words)) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGTERM)
        assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    assert train.run_training(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_compiled_run_trains_and_is_evaluated(shapes_root, tmp_path):
    words = ("--compile", "--mixed_precision", "bf16", "--batch_norm", "frozen")
    assert train.run_training(arguments(shapes_root, tmp_path / "out", *words)) == 0
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_objects", [True, False])
@pytest.mark.parametrize("decoder", ["llama", "transformer"])
def test_recorded_steps_write_what_single_ones_write(monkeypatch, decoder, noise_objects, dtype):
    model, options = ending(decoder, noise_objects)
    model = model.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = model.detect(some_pictures().cuda(), options)
        monkeypatch.setattr(generate_module, "object_by_object", generate_module.token_by_token)
        expected = model.detect(some_pictures().cuda(), options)
    assert sum(np.array_equal(a.boxes, b.boxes) for a, b in zip(expected, found, strict=True)) >= 36
    assert len({len(one.boxes) for one in found}) > 3  # so that the batch becomes smaller on its way


def test_recordings_do_not_pile_up(make_model):
    model = spread(make_model(max_objects=6)).cuda()
    taken = []
    for _ in range(5):
        model.detect(some_pictures().cuda(), DecodingOptions(6, top_p=0.4))
        taken.append(torch.cuda.memory_reserved())
    assert taken[-1] == taken[1]


def test_a_gpu_writes_what_a_cpu_writes(make_model):
    """Some sentences may part where two tokens are as good as equally likely."""
    model = spread(make_model(max_objects=6))
    pictures = some_pictures()
    options = DecodingOptions(6, top_p=0)
    expected = model.detect(pictures, options)
    found = model.cuda().detect(pictures.cuda(), options)
    assert sum((a.boxes == b.boxes).all() for a, b in zip(expected, found, strict=True)) >= 36
