"""Shared fixtures: a synthetic dataset and models small enough to build in a test. Nothing needs the network."""

import os

# torch and transformers read these variables on import. Without the limit, the oneDNN bf16 kernels of some CPUs crash
# in containers. Threads only slow down models of this size.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig

from pix2seq import Pix2Seq, Pix2SeqImageProcessor, train
from pix2seq.data.shapes import CATEGORY_IDS, SHAPES, draw_dataset
from pix2seq.models import Pix2SeqConfig, Pix2SeqForObjectDetection
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer
from tests.runs import arguments

# The same examples in every run, and no time limit.
settings.register_profile("pix2seq", deadline=None, derandomize=True, database=None)
settings.load_profile("pix2seq")

# `make test-hf` runs these tests: they need the source distribution of transformers.
collect_ignore = ["hf"]

TINY_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A COCO dataset of shapes, 12 training and 5 validation images of 64 pixels. Read-only."""
    return draw_dataset(tmp_path_factory.mktemp("shapes") / "root", num_train=12, num_val=5, size=64, seed=3)


@pytest.fixture(scope="session")
def finished(shapes_root, tmp_path_factory) -> Path:
    """The run folder of the complete run of tests/runs.py. Read-only."""
    output = tmp_path_factory.mktemp("run") / "out"
    assert train.run_training(arguments(shapes_root, output)) == 0
    return output


@pytest.fixture(scope="session")
def make_model():
    """Returns a function that builds a tiny Pix2SeqForObjectDetection in eval mode.

    Its arguments are those of Pix2SeqConfig, and `decoder_layers`, `decoder` (LlamaConfig arguments) and `seed`.
    """

    def make(decoder_layers: int = 2, decoder: dict | None = None, seed: int = 0, **kwargs):
        kwargs = {
            "backbone_config": dict(TINY_BACKBONE),
            "hidden_size": 16,
            "encoder_layers": 1,
            "encoder_heads": 2,
            "encoder_mlp_size": 32,
            "dropout": 0.0,
            "drop_path": 0.0,
            "decoding": {"top_p": 0.4, "temperature": 1.0, "seed": 0},
            "image_size": 64,
            "num_bins": 50,
            "max_objects": 4,
            "category_ids": CATEGORY_IDS,
            "id2label": dict(enumerate(SHAPES)),
            "label2id": {name: label for label, name in enumerate(SHAPES)},
        } | kwargs
        tokenizer = Tokenizer(len(kwargs["category_ids"]), kwargs["num_bins"])
        decoder_config = {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": kwargs["hidden_size"],
            "intermediate_size": 32,
            "num_hidden_layers": decoder_layers,
            "num_attention_heads": 2,
            "max_position_embeddings": TOKENS_PER_OBJECT * kwargs["max_objects"] + 2,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "spatial_modulation": True,
        } | (decoder or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Pix2SeqForObjectDetection(
                Pix2SeqConfig(decoder_config=LlamaConfig(**decoder_config), **kwargs)
            ).eval()

    return make


@pytest.fixture(scope="session")
def folder(make_model, tmp_path_factory) -> Path:
    """A `from_pretrained` folder of a tiny model. Read-only."""
    folder, model = tmp_path_factory.mktemp("model"), make_model(seed=5)
    with torch.no_grad():  # larger weights, so that predictions differ between slots
        for parameter in model.parameters():
            parameter *= 3
    model.save_pretrained(folder)
    Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector(folder) -> Pix2Seq:
    """The inference class with the model of `folder`."""
    return Pix2Seq.from_pretrained(folder, device="cpu")
