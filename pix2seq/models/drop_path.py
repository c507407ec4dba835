"""Drop path (stochastic depth) for layers of transformers, which have none."""

import torch
from torch import nn
from torchvision.ops import stochastic_depth
from transformers.configuration_utils import PretrainedConfig


class DropPathHook:
    """A forward hook of the last layer of a residual branch that drops the whole branch in training.

    Args:
        config: Its `drop_path` is the probability that the branch of an image is dropped.
    """

    def __init__(self, config: PretrainedConfig):
        self.config = config

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return stochastic_depth(output, self.config.drop_path, "row", module.training)
