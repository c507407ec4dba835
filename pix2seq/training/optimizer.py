"""Which parameters learn how fast, which of them decay, and when."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_wsd_schedule

from pix2seq.errors import UserError


def parameter_groups(
    model: nn.Module, lr: float, lr_backbone: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict]:
    """Optimizer groups: the backbone has its own learning rate, and only kernels decay.

    Kernels are the weights of linear and convolution layers; norms, biases, embeddings (the tied output layer is one)
    and position tables do not decay. `lr_backbone` is that of the backbone's last layer, and each layer below learns
    `layer_decay` times as fast as the one above it.
    """
    kernels = _kernels(model)
    learning_rates = {id(parameter): lr for parameter in model.parameters()}
    depths = {name: depth for name, (_, depth) in model.backbone.layer_of_parameters().items()}
    deepest = max(depths.values())
    if layer_decay != 1 and deepest < 2:
        raise UserError(
            f"--layer_decay {layer_decay}: the layers of this backbone cannot be told apart; leave it at 1"
        )
    for name, parameter in model.backbone.named_parameters():
        learning_rates[id(parameter)] = lr_backbone * layer_decay ** (deepest - depths[name])
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.startswith("backbone."), learning_rates[id(parameter)], parameter in kernels
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": group_lr, "weight_decay": weight_decay if decays else 0.0}
        # The backbone first, kernels before what does not decay.
        for (_, group_lr, decays), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _kernels(model: nn.Module) -> set[nn.Parameter]:
    kernels = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kernels.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            kernels.add(module.in_proj_weight)
    return kernels - {model.decoder.get_input_embeddings().weight, model.decoder.lm_head.weight}


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, max_steps: int, end: float, decay_steps: int
) -> LambdaLR:
    """A linear warm-up to the peak, from `end` times it (constant: from 0), then, down to `end` times the peak:

    linear, cosine   on the way from there to the last step        constant   never
    wsd              in the last `decay_steps`, linearly (0: the last fifth of the run)
    """
    after_warmup = max(max_steps - warmup_steps, 0)
    decay = {"constant": 0, "wsd": min(decay_steps or max_steps // 5, after_warmup)}.get(name, after_warmup)
    end = 0.0 if name == "constant" else end
    # Without a decay there is nothing below the peak to end at; the steps of a run made longer stay there.
    stable = after_warmup - decay if decay else torch.iinfo(torch.int64).max
    return get_wsd_schedule(
        optimizer,
        warmup_steps,
        decay,
        num_stable_steps=stable,
        decay_type="cosine" if name == "cosine" else "linear",
        min_lr_ratio=end,
    )
