"""What the launchers, `accelerate launch` and torchrun, leave to the processes they start."""

import ctypes
import os
import platform
import signal
import sys

import torch

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def restarts() -> int:
    """How often torchelastic has started these processes again after a crash."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launcher_id() -> str:
    """Tells the launcher that has started this process from any other."""
    return f"{platform.node()} {os.getppid()}"


def set_parent_death_signal() -> None:
    """`accelerate launch` with one process dies of SIGTERM and does not pass it on. The kernel does, where it can."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":  # set by `accelerate launch`
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def rejoin_process_group() -> None:
    """Processes started again would wait for those that died: torchelastic hands them the store in which the first
    attempt wrote its addresses. Each attempt gets a part of the store of its own."""
    if restarts() == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=torch.distributed.PrefixStore(f"attempt_{restarts()}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
