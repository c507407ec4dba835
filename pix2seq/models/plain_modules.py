"""Decides where code may use the weights of a module instead of calling the module."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from pix2seq.models.drop_path import DropPathHook


def is_plain(module: nn.Module, forwards: Mapping[Any, Callable]) -> bool:
    """Returns whether calling a module in eval mode computes what its class defines from its own parameters.

    Adapters, quantized layers and parametrizations have other types. Hooks, a replaced `forward` and weights that are
    quantized, sharded or offloaded change what an unchanged type computes.

    Args:
        module: The module; its submodules are not considered.
        forwards: The types whose computation is known, and their `forward`; subclasses are not known.
    """
    hooks = [
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
    ]
    return (
        forwards.get(type(module)) is type(module).forward
        and "forward" not in vars(module)
        and all(isinstance(hook, DropPathHook) for hook in hooks)  # does nothing in eval mode
        and all(type(p) is nn.Parameter and not p.is_meta for p in module.parameters(recurse=False))
    )
