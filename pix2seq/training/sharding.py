"""The weights and the optimizer's state as if one process held them all, however they are wrapped and sharded.

All ranks call these functions together; every rank gets the whole.
"""

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pix2seq.models import Pix2SeqForObjectDetection

WHOLE = StateDictOptions(full_state_dict=True)


def gather_full_model(detector: nn.Module) -> Pix2SeqForObjectDetection:
    """The detector itself or, if FSDP2 has sharded it, a copy that holds all of its weights.

    A copy, because ranks may decode different numbers of batches, and sharded layers wait for all ranks.
    """
    if not isinstance(detector, FSDPModule):
        return detector
    whole = Pix2SeqForObjectDetection(detector.config).to(detector.device)
    whole.load_state_dict(get_model_state_dict(detector, options=WHOLE))
    return whole.train(detector.training)


def gather_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.gather_full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """By the names of the parameters; None before the first step."""
    if not optimizer.state:  # asked for a state, PyTorch would take a step to have one
        return None
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict | None) -> None:
    if state is not None:
        set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
