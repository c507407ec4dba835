"""Parameter groups of the optimizer, and learning rate schedules."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_wsd_schedule

from pix2seq.errors import UserError
from pix2seq.models import Pix2SeqForObjectDetection


def parameter_groups(
    model: Pix2SeqForObjectDetection,
    lr: float,
    lr_backbone: float,
    weight_decay: float,
    layer_decay: float = 1.0,
) -> list[dict]:
    """Groups the trainable parameters by learning rate and weight decay.

    Only kernels decay: the weights of linear and convolution layers. Norms, biases, embeddings (which the output layer
    shares) and position embeddings do not.

    Args:
        model: the model to train.
        lr: learning rate of everything but the backbone.
        lr_backbone: learning rate of the last layer of the backbone.
        weight_decay: weight decay of kernels.
        layer_decay: ratio of the learning rates of a layer of the backbone and the layer after it.

    Returns:
        Optimizer groups, the backbone first.

    Raises:
        UserError: `layer_decay` is not 1 and the layers of the backbone cannot be identified.
    """
    kernels = _kernels(model)
    learning_rates = {id(parameter): lr for parameter in model.parameters()}
    depths = {name: depth for name, (_, depth) in model.backbone.parameter_layers().items()}
    last_depth = max(depths.values())
    if layer_decay != 1 and last_depth < 2:
        raise UserError(f"--layer_decay {layer_decay}: this backbone has no layers to tell apart; leave it at 1")
    for name, parameter in model.backbone.named_parameters():
        learning_rates[id(parameter)] = lr_backbone * layer_decay ** (last_depth - depths[name])
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.startswith("backbone."), learning_rates[id(parameter)], parameter in kernels
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": group_lr, "weight_decay": weight_decay if decays else 0.0}
        for (_, group_lr, decays), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _kernels(model: Pix2SeqForObjectDetection) -> set[torch.Tensor]:
    kernels: set[torch.Tensor] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kernels.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            kernels.add(module.in_proj_weight)
    return kernels - {model.decoder.get_input_embeddings().weight, model.decoder.lm_head.weight}


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    warmup_steps: int,
    max_steps: int,
    min_lr_ratio: float,
    decay_steps: int = 0,
) -> LambdaLR:
    """Creates a schedule with a linear warm-up.

    The learning rate rises from `min_lr_ratio` times the peak to the peak (`constant`: from 0). Then it decays to
    `min_lr_ratio` times the peak: until the last step (`linear`, `cosine`), linearly in the last `decay_steps` steps
    (`wsd`), or not at all (`constant`).

    Args:
        optimizer: its learning rates are the peaks.
        name: linear, cosine, wsd or constant.
        warmup_steps: steps of the warm-up.
        max_steps: steps of the whole run.
        min_lr_ratio: first and last learning rate, relative to the peak.
        decay_steps: steps of the decay of `wsd`; 0 is a fifth of the run.
    """
    after_warmup = max(max_steps - warmup_steps, 0)
    decay = {"constant": 0, "wsd": min(decay_steps or max_steps // 5, after_warmup)}.get(name, after_warmup)
    # A schedule without decay never ends, so that an extended run keeps the peak.
    stable = after_warmup - decay if decay else torch.iinfo(torch.int64).max
    return get_wsd_schedule(
        optimizer,
        warmup_steps,
        decay,
        num_stable_steps=stable,
        decay_type="cosine" if name == "cosine" else "linear",
        min_lr_ratio=0.0 if name == "constant" else min_lr_ratio,
    )
