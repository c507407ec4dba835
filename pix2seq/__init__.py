"""Pix2Seq: object detection as language modelling (Chen et al., arXiv 2109.10852)."""

__version__ = "0.1.0"
