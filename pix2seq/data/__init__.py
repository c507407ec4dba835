"""Datasets in COCO format: annotations, images, training examples and data loaders.

The steps from the files to batches are `layouts` (where the files are), `image_files`, `coco` (annotations as arrays),
`issues`, `datasets` and `loaders`. `check`, `show`, `shards` and `convert` are the tools behind the commands.
"""

from pix2seq.data.coco import Annotations, Categories, load_annotations
from pix2seq.data.datasets import EvalDataset, TrainDataset
from pix2seq.data.layouts import Split, find_split
from pix2seq.data.loaders import StepSampler, eval_loader, train_loader
from pix2seq.data.recommended_sizes import recommended_sizes
from pix2seq.data.repeat_factors import repeat_factors

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
    "recommended_sizes",
    "repeat_factors",
    "train_loader",
]
