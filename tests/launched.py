"""train.py with modifications, for tests that launch processes. Environment variables select them:

SHARD=1            FSDP2 on the CPU, which Accelerate's launcher refuses
GRADIENTS=FILE     writes the gradients of the first step
SPLIT=1            rank 1 has another run folder than rank 0
CRASH_AT=STEP      rank 1 crashes in this step of the first attempt
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parent.parent))
from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments


def shard() -> None:
    """Makes train.py shard the model with FSDP2."""
    make_accelerator = train.make_accelerator

    def make_sharding_accelerator(**kwargs):
        accelerator = make_accelerator(**kwargs)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        return accelerator

    train.make_accelerator = make_sharding_accelerator


def write_gradients(path: str) -> None:
    """Makes train.py write the gradients of the first step."""
    clip = Accelerator.clip_grad_norm_

    def clip_and_write(self, *args, **kwargs):
        if self.is_main_process and not Path(path).exists():
            model = self.unwrap_model(self._models[0])
            torch.save({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, path)
        return clip(self, *args, **kwargs)

    Accelerator.clip_grad_norm_ = clip_and_write


def crash_at(step: int) -> None:
    """Makes rank 1 crash in a step, unless torchelastic has restarted it."""
    original = train.train_step

    def crashing(context, micro_batches):
        is_first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if context.step + 1 == step and context.accelerator.process_index == 1 and is_first_attempt:
            os._exit(9)
        return original(context, micro_batches)

    train.train_step = crashing


if __name__ == "__main__":
    if "SHARD" in os.environ:
        shard()
    if "GRADIENTS" in os.environ:
        write_gradients(os.environ["GRADIENTS"])
    if "CRASH_AT" in os.environ:
        crash_at(int(os.environ["CRASH_AT"]))
    arguments = parse(TrainArguments)
    if "SPLIT" in os.environ and os.environ["RANK"] == "1":
        arguments.output_dir += ".other"
    sys.exit(train.run_training(arguments))
