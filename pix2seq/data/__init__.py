"""From the files of a dataset to batches, in this order:

sources     where the splits lie             faults      what can be wrong, and what becomes of it
images      files to pixels                  coco        annotations as arrays
datasets    examples                         loading     their order, and batches
unreadable  how many may be replaced

The commands of `python -m pix2seq.data` stand beside them: check, show, convert, shards.
"""

from pix2seq.data.coco import Annotations, Categories, load_annotations
from pix2seq.data.datasets import EvalDataset, TrainDataset
from pix2seq.data.layouts import Split, find_split
from pix2seq.data.loaders import StepSampler, eval_loader, train_loader

__all__ = [
    "Annotations",
    "Categories",
    "EvalDataset",
    "Split",
    "StepSampler",
    "TrainDataset",
    "eval_loader",
    "find_split",
    "load_annotations",
    "train_loader",
]
