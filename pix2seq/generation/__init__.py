"""Generation of token sequences under a grammar."""

from pix2seq.generation.generate import generate, write
from pix2seq.generation.grammar import Grammar, sample_top_p
from pix2seq.generation.options import DecodingOptions, Detections, Interrupted, NonFiniteLogits

__all__ = [
    "DecodingOptions",
    "Detections",
    "Grammar",
    "Interrupted",
    "NonFiniteLogits",
    "generate",
    "sample_top_p",
    "write",
]
