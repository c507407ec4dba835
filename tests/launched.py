"""train.py for tests that launch processes, with what they cannot reach from outside.

SHARD=1            FSDP2 although there is no GPU, which Accelerate's launcher refuses
GRADIENTS=FILE     writes the gradients of the first step
SPLIT=1            rank 1 sees another run folder than rank 0
CRASH_AT=STEP      rank 1 dies in this step, unless torchelastic has already started it again
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
    join = train.make_accelerator

    def join_sharded(args):
        accelerator = join(args)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        return accelerator

    train.make_accelerator = join_sharded


def write_gradients(path: str) -> None:
    clip = Accelerator.clip_grad_norm_

    def clip_and_write(self, *args, **kwargs):
        if self.is_main_process and not Path(path).exists():
            model = self.unwrap_model(self._models[0])
            torch.save({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, path)
        return clip(self, *args, **kwargs)

    Accelerator.clip_grad_norm_ = clip_and_write


def crash_at(step: int) -> None:
    original = train.train_step

    def crashing(training, micro_batches):
        if (
            training.step + 1 == step
            and training.accelerator.process_index == 1
            and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        ):
            os._exit(9)
        return original(training, micro_batches)

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
