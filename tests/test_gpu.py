"""What only a GPU can show: `make test-gpu`. Sizes stay small; nothing is downloaded."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

import train
from tests.test_train import arguments, interrupt_at, rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Precision is part of Accelerate's state, of which a process has one."""
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("decoder", ["llama", "transformer"])
def test_a_deterministic_run_resumes_to_the_bit(shapes_root, tmp_path, monkeypatch, precision, decoder):
    words = ("--deterministic", "--mixed_precision", precision, "--decoder", decoder, "--max_grad_norm", "1")
    assert train.main(arguments(shapes_root, tmp_path / "whole", *words)) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, signal.SIGTERM)
        assert train.main(arguments(shapes_root, tmp_path / "cut", *words)) == 75
    assert train.main(arguments(shapes_root, tmp_path / "cut", *words, "--resume", "auto")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_compiled_run_trains_and_is_evaluated(shapes_root, tmp_path):
    words = ("--compile", "--mixed_precision", "bf16", "--batch_norm", "frozen")
    assert train.main(arguments(shapes_root, tmp_path / "out", *words)) == 0
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "finished"
