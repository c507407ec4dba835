"""Which parameters learn how fast, and which of them decay."""

from torch import nn


def parameter_groups(model: nn.Module, lr: float, lr_backbone: float, weight_decay: float) -> list[dict]:
    """Optimizer groups: the backbone has its own learning rate, and only kernels decay.

    Kernels are the weights of linear and convolution layers; norms, biases, embeddings (the tied output layer is one)
    and position tables do not decay.
    """
    embedding = model.decoder.get_input_embeddings().weight
    kernels = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            kernels.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            kernels.add(module.in_proj_weight)
    kernels.discard(embedding)
    kernels.discard(model.decoder.lm_head.weight)
    groups = []
    for prefix_is_backbone, group_lr in ((True, lr_backbone), (False, lr)):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and name.startswith("backbone.") == prefix_is_backbone
                and (parameter in kernels) == decays
            ]
            groups.append({"params": parameters, "lr": group_lr, "weight_decay": weight_decay if decays else 0.0})
    return [group for group in groups if group["params"]]
