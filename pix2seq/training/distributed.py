"""Processes: Accelerate, the launchers, and state that FSDP shards."""

import ctypes
import os
import platform
import signal
import sys

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection

PR_SET_PDEATHSIG = 1  # from linux/prctl.h
FULL_STATE_DICT = StateDictOptions(full_state_dict=True)


def make_accelerator(
    *,
    mixed_precision: str | None,
    compile: bool,
    gradient_accumulation_steps: int,
    report_to: list[str],
    output_dir: str,
) -> Accelerator:
    """Creates the Accelerator, which initializes the process group, and checks its settings.

    Args:
        mixed_precision: "no", "bf16" or "fp16"; None takes the launcher's setting.
        compile: compile the model with inductor.
        gradient_accumulation_steps: micro-batches of an optimizer step.
        report_to: names of experiment trackers.
        output_dir: run folder.

    Raises:
        UserError: a tracker is unknown or not installed, or the precision or FSDP setting is not supported.
    """
    known = [tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to:  # Accelerate silently ignores trackers that are not installed
        if name not in known:
            raise UserError(f"--report_to {name}: must be none or among {', '.join(known)}")
        if name not in installed:
            raise UserError(f"--report_to {name}: is not installed (pip install {name})")
    rejoin_process_group()
    try:
        accelerator = Accelerator(
            # Without a GPU, processes join only with cpu=True. It also excludes MPS, which has no float64.
            cpu=not torch.cuda.is_available(),
            mixed_precision=mixed_precision,
            dynamo_backend="inductor" if compile else None,
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=report_to or None,
            project_dir=output_dir,
        )
    except ValueError as error:  # for example fp16 without a GPU
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but Accelerate joined {accelerator.num_processes}"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP: only version 2 is supported (fsdp_version: 2 in Accelerate's config)")
    return accelerator


def restart_count() -> int:
    """Number of times that torchelastic has restarted these processes after a crash."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launcher_id() -> str:
    """Host and process id of the launcher that started this process."""
    return f"{platform.node()} {os.getppid()}"


def set_parent_death_signal() -> None:
    """Asks the Linux kernel for a SIGTERM when `accelerate launch` ends, which does not forward signals by itself."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":  # set by `accelerate launch`
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def rejoin_process_group() -> None:
    """Initializes the process group of processes that torchelastic has restarted.

    torchelastic reuses the store of the first attempt, which still holds the addresses of the crashed processes, so
    each attempt gets its own prefix in the store.
    """
    if restart_count() == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=torch.distributed.PrefixStore(f"attempt_{restart_count()}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def gather_full_model(model: Pix2SeqForObjectDetection) -> Pix2SeqForObjectDetection:
    """Returns a copy with all weights of a model that FSDP2 shards, or else the model itself.

    All processes call this together. A forward pass of a sharded model is a collective operation, which would deadlock
    if processes evaluate different numbers of batches; the copy needs no communication.
    """
    if not isinstance(model, FSDPModule):
        return model
    full_model = Pix2SeqForObjectDetection(model.config).to(model.device)
    full_model.load_state_dict(get_model_state_dict(model, options=FULL_STATE_DICT))
    return full_model.train(model.training)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gathers a tensor if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Full optimizer state by parameter name; None before the first step. All processes call this together."""
    if not optimizer.state:  # PyTorch would take a step to create the state
        return None
    return get_optimizer_state_dict(model, optimizer, options=FULL_STATE_DICT)


def load_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, state_dict: dict | None) -> None:
    """Restores `optimizer_state_dict`, sharded or not. All processes call this together."""
    if state_dict is not None:
        set_optimizer_state_dict(model, optimizer, state_dict, options=FULL_STATE_DICT)
