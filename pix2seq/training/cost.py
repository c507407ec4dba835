"""FLOPs and memory of a training step, counted without weights, data or a GPU.

A forward and a backward pass run on fake tensors, which have shapes but no values. FLOPs are those of matrix products,
convolutions and attention; a multiply-add counts as two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers.modeling_layers import GradientCheckpointingLayer

# Dense peaks of the data sheets in FLOP/s, by the beginning of torch.cuda.get_device_name, and memory in GiB.
# float32 is without TF32, PyTorch's default.
GPUS: dict[str, dict] = {
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
    """Peak FLOP/s of a GPU.

    Args:
        device_name: name from `torch.cuda.get_device_name`.
        precision: no, fp16 or bf16.

    Returns:
        FLOP/s, None for an unknown GPU.
    """
    matches = [gpu for gpu in GPUS.values() if device_name.startswith(gpu["name"])]
    return max(matches, key=lambda gpu: len(gpu["name"]))[precision] if matches else None


@dataclass
class StepCost:
    """Cost of a training step.

    Attributes:
        forward_flops: FLOPs of one forward pass.
        step_flops: FLOPs of a forward pass and the backward pass of the trained parameters.
        recomputed_flops: FLOPs that gradient checkpointing adds.
        activation_bytes: memory of the tensors saved for the backward pass; with gradient checkpointing including
            those of the layer that is recomputed.
    """

    forward_flops: float
    step_flops: float
    recomputed_flops: float
    activation_bytes: float


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# Attention kernels of the CPU, which PyTorch's counter does not include.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """A context manager that counts FLOPs: `get_total_flops()`."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def step_cost(
    model: nn.Module, inputs: dict, loss_of: Callable = lambda output: output.loss, precision: str = "no"
) -> StepCost:
    """Counts one training step of `model(**inputs)`.

    Args:
        model: any module, also on the meta device. It is not changed.
        inputs: keyword arguments of the forward pass; tensors may be on the meta device.
        loss_of: function from the output to the loss.
        precision: no, fp16 or bf16; the last two run under autocast, as Accelerate does.

    Returns:
        The cost.
    """
    with FakeTensorMode():
        state, saved = {}, {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            is_trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            state[name] = torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(is_trained)
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        inputs = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage  # a reference, so that the address is not used again
            return tensor

        def forward():
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"),
                torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            ):
                return torch.func.functional_call(model, state, kwargs=inputs)

        def saved_bytes() -> int:
            return sum(storage.nbytes() for storage in saved.values())

        forward()
        activation_bytes = saved_bytes()
        saved.clear()
        # A second pass without checkpointing gives the FLOPs of a step, and FLOPs and memory of each layer.
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        for layer in layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]  # not a Tensor or Module
        before, recomputed_flops, largest_layer, hooks = {}, [0], [0], []

        def enter(layer, inputs):
            before[layer] = counter.get_total_flops(), saved_bytes()

        def leave(layer, inputs, output):
            flops, size = before[layer]
            recomputed_flops[0] += counter.get_total_flops() - flops
            largest_layer[0] = max(largest_layer[0], saved_bytes() - size)

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
                layer.gradient_checkpointing = True  # type: ignore[assignment]  # not a Tensor or Module
            for hook in hooks:
                hook.remove()
        return StepCost(
            forward_flops=forward_flops,
            step_flops=counter.get_total_flops(),
            recomputed_flops=recomputed_flops[0],
            activation_bytes=activation_bytes + largest_layer[0],
        )


def model_step_cost(
    model, batch_size: int, sequence_length: int, precision: str, loss_positions_per_image: int
) -> StepCost:
    """Counts a training step of a Pix2SeqForObjectDetection.

    Args:
        model: the model, also on the meta device.
        batch_size: images.
        sequence_length: tokens of a sequence.
        precision: no, fp16 or bf16.
        loss_positions_per_image: tokens with a loss weight.

    Returns:
        The cost.
    """
    side = model.config.image_size
    token_ids = torch.zeros(batch_size, sequence_length, dtype=torch.long, device="meta")
    inputs = {
        "pixel_values": torch.zeros(batch_size, 3, side, side, dtype=torch.uint8, device="meta"),
        "input_ids": token_ids,
        "labels": token_ids,
        "token_weights": token_ids.float(),
        "num_items_in_batch": 1.0,
        "loss_positions": torch.zeros(batch_size * loss_positions_per_image, dtype=torch.long, device="meta"),
    }
    return step_cost(model, inputs, precision=precision)
