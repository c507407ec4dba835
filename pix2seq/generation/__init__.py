"""Autoregressive generation of token sequences. Converting tokens to boxes is up to `pix2seq.models.detections`."""

from pix2seq.generation.decoding_state import DecodingState
from pix2seq.generation.generate import generate_tokens
from pix2seq.generation.grammar import Grammar
from pix2seq.generation.options import DecodingOptions, Interrupted, NonFiniteLogits
from pix2seq.generation.sampling import sample_top_p

__all__ = [
    "DecodingOptions",
    "DecodingState",
    "Grammar",
    "Interrupted",
    "NonFiniteLogits",
    "generate_tokens",
    "sample_top_p",
]
