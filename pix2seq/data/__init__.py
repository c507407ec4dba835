"""From the files of a dataset to batches: sources, annotations, images, examples, loaders."""

from pix2seq.data.coco import Annotations, Categories, load_annotations
from pix2seq.data.datasets import EvalDataset, TrainDataset
from pix2seq.data.loading import StepSampler, eval_loader, train_loader
from pix2seq.data.sources import Split, find_split

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
