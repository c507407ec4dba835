"""From pixels to objects: a grammar, a sampling rule, and two ways to write a sentence."""

from pix2seq.decoding.generation import generate, write
from pix2seq.decoding.grammar import Grammar, sample_top_p
from pix2seq.decoding.options import DecodingOptions, Detections, Draft, Interrupted, NonFiniteLogits

__all__ = [
    "DecodingOptions",
    "Detections",
    "Draft",
    "Grammar",
    "Interrupted",
    "NonFiniteLogits",
    "generate",
    "sample_top_p",
    "write",
]
