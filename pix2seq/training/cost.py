"""What a training step costs, FLOPs and memory, found out without weights, data or a GPU.

A forward and a backward pass are run on tensors that have shapes and no values. FLOPs are those of matrix products,
convolutions and attention; a multiplication and an addition count two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.modeling_layers import GradientCheckpointingLayer

# Dense peaks of the makers' data sheets, in FLOP/s, by how torch.cuda.get_device_name begins; then memory in GiB.
# float32 without TF32, as PyTorch multiplies by default.
GPUS = {
    "b200": {"name": "NVIDIA B200", "bf16": 2250e12, "fp16": 2250e12, "no": 75e12, "memory": 178},
    "h200": {"name": "NVIDIA H200", "bf16": 989e12, "fp16": 989e12, "no": 67e12, "memory": 139},
    "h100": {"name": "NVIDIA H100", "bf16": 989e12, "fp16": 989e12, "no": 67e12, "memory": 79},
    "a100": {"name": "NVIDIA A100", "bf16": 312e12, "fp16": 312e12, "no": 19.5e12, "memory": 79},
    "a100-40": {"name": "NVIDIA A100-SXM4-40GB", "bf16": 312e12, "fp16": 312e12, "no": 19.5e12, "memory": 39},
    "l40s": {"name": "NVIDIA L40S", "bf16": 362e12, "fp16": 362e12, "no": 91.6e12, "memory": 44},
    "l4": {"name": "NVIDIA L4", "bf16": 121e12, "fp16": 121e12, "no": 30.3e12, "memory": 22},
    "a10": {"name": "NVIDIA A10", "bf16": 125e12, "fp16": 125e12, "no": 31.2e12, "memory": 22},
    "rtx4090": {"name": "NVIDIA GeForce RTX 4090", "bf16": 165e12, "fp16": 165e12, "no": 82.6e12, "memory": 23},
    "v100": {"name": "Tesla V100", "bf16": None, "fp16": 125e12, "no": 15.7e12, "memory": 31},
    "t4": {"name": "Tesla T4", "bf16": None, "fp16": 65e12, "no": 8.1e12, "memory": 15},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by what PyTorch calls it; None if it is not in the table."""
    known = [gpu for gpu in GPUS.values() if device_name.startswith(gpu["name"])]
    return max(known, key=lambda gpu: len(gpu["name"]))[precision] if known else None


@dataclass
class StepCost:
    """forward_flops, step_flops   of one forward pass, and of it with the backward pass of what learns
    recomputed_flops               what gradient checkpointing adds to that
    activation_bytes               what is kept from the one pass for the other, with checkpointing also what the layer
                                   keeps that is computed again
    """

    forward_flops: float
    step_flops: float
    recomputed_flops: float
    activation_bytes: float


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# The kernels of a CPU, which PyTorch's counter does not know.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """Counts what is computed in its context: `get_total_flops()`."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def step_cost(
    model: nn.Module, arguments: dict, loss_of: Callable = lambda output: output.loss, precision: str = "no"
) -> StepCost:
    """One training step of `model(**arguments)`. Neither is changed, and both may lie on the meta device.

    precision   bf16 or fp16: under autocast, as Accelerate trains
    """
    with FakeTensorMode():
        state, kept = {}, {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            learns = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(learns)
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        arguments = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that no other gets its number
            return tensor

        def forward():
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                return torch.func.functional_call(model, state, kwargs=arguments)

        def kept_bytes() -> int:
            return sum(storage.nbytes() for storage in kept.values())

        forward()
        activation_bytes = kept_bytes()
        kept.clear()
        # Again without checkpointing, to see what a step is worth, and what each layer computes and keeps.
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        for layer in layers:
            layer.gradient_checkpointing = False
        before, recomputed, largest, hooks = {}, [0], [0], []

        def enter(layer, inputs):
            before[layer] = counter.get_total_flops(), kept_bytes()

        def leave(layer, inputs, output):
            flops, size = before[layer]
            recomputed[0] += counter.get_total_flops() - flops
            largest[0] = max(largest[0], kept_bytes() - size)

        for layer in layers:
            if isinstance(layer, GradientCheckpointingLayer):
                hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
        try:
            with flop_counter() as counter:
                output = forward()
                forward_flops = counter.get_total_flops()
                loss_of(output).backward()
        finally:
            for layer in layers:
                layer.gradient_checkpointing = True
            for hook in hooks:
                hook.remove()
        return StepCost(forward_flops, counter.get_total_flops(), recomputed[0], activation_bytes + largest[0])


def model_step_cost(model, batch_size: int, length: int, precision: str, targets_per_image: int) -> StepCost:
    """A step of a detector on `batch_size` pictures and sentences of `length` tokens, so many of which are targets."""
    side = model.config.image_size
    sentence = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    arguments = {
        "pixel_values": torch.zeros(batch_size, 3, side, side, dtype=torch.uint8, device="meta"),
        "input_ids": sentence,
        "labels": sentence,
        "token_weights": sentence.float(),
        "normalizer": 1.0,
        "loss_positions": torch.zeros(batch_size * targets_per_image, dtype=torch.long, device="meta"),
    }
    return step_cost(model, arguments, precision=precision)
