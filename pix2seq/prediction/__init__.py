"""A trained detector in use: pictures as one has them in, boxes with names out. predict.py is made of it."""

from pix2seq.prediction.predictor import Found, Pix2Seq

__all__ = ["Found", "Pix2Seq"]
