"""Hugging Face vision models as maps from pixels to a grid of features."""

import copy
import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, TimmBackboneConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut
from transformers.utils import cached_file

from pix2seq.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Where a pyramid is cut: after the stage of stride 8, 16 or 32; dc5 is c5 at stride 16, its last stage dilated.
Stage = Literal["c3", "c4", "c5", "dc5"]
BatchNorm = Literal["sync", "local", "frozen"]

# What a number follows in the names of Hugging Face's and timm's parameters: stages, and layers in them.
_NUMBERED = re.compile(r"(?:^|\.)(?:stages?|layers?|blocks?)[._]?(\d+)")


@dataclass
class BackboneChoice:
    """A backbone by its config, the pixels it expects and, if it is a pretrained one, where its weights are."""

    config: PretrainedConfig
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    pretrained: str | None = None


def choose_backbone(name: str, stage: Stage = "c5") -> BackboneChoice:
    """A hub name or local folder, whose weights are used, or an inline config like "{model_type: resnet}".

    Raises UserError if it is none of these, or cannot be cut at this stage.
    """
    try:
        if name.lstrip().startswith("{"):
            return BackboneChoice(_cut(AutoConfig.for_model(**yaml.safe_load(name)), name, stage))
        config = AutoConfig.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # a config's constructor may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--backbone {name}: no such hub model, local folder or inline config ({reason})") from None
    choice = BackboneChoice(_cut(_usable(config), name, stage), pretrained=name)
    mean, std = _pixels(name, config)
    return dataclasses.replace(choice, image_mean=mean, image_std=std)


def _pixels(name: str, config: PretrainedConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels a pretrained model expects. Raises UserError if its processor has odd ones."""
    if config.model_type == "timm_wrapper":
        known = config.pretrained_cfg or {}
        mean, std = known.get("mean", IMAGENET_MEAN), known.get("std", IMAGENET_STD)
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError):  # a folder with nothing but a model
            return IMAGENET_MEAN, IMAGENET_STD
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    for values in (mean, std):
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(
                f"--backbone {name}: its image processor has mean {mean} and std {std}: three each are needed"
            )
    return tuple(mean), tuple(std)


def _usable(config: PretrainedConfig) -> PretrainedConfig:
    """timm's models on the hub are made for classification: the same model as a backbone."""
    if config.model_type != "timm_wrapper":
        return config
    return TimmBackboneConfig(backbone=config.architecture, use_pretrained_backbone=False, out_indices=(-1,))


def _cut(config: PretrainedConfig, name: str, stage: Stage) -> PretrainedConfig:
    """The config without the stages after `stage`: a stage that is built but not used would be a weight without
    gradient."""
    if stage == "c5":
        return config
    if stage == "dc5" and config.model_type != "resnet":
        raise UserError(f"--backbone_stage dc5: only a ResNet can be dilated; --backbone {name} is none")
    num_stages = {"c3": 2, "c4": 3, "dc5": 4}[stage]
    values = config.to_dict()
    if len(values.get("depths") or ()) < num_stages:
        raise UserError(f"--backbone_stage {stage}: --backbone {name} is not made of that many stages; c5 takes any")
    for key in ("depths", "hidden_sizes", "num_heads"):
        if isinstance(values.get(key), list | tuple):
            values[key] = list(values[key])[:num_stages]
    if "num_stages" in values:
        values["num_stages"] = num_stages
    for key in ("model_type", "out_features", "out_indices", "stage_names"):
        values.pop(key, None)
    return AutoConfig.for_model(config.model_type, **values)


class VisionBackbone(nn.Module):
    """(B, 3, S, S) pixels -> (B, C, h, w) features: the last stage of a pyramid, or a ViT's patch tokens.

    dilated   the last stage of a ResNet keeps the stride of the one before (DC5)
    """

    def __init__(self, config: PretrainedConfig, dilated: bool = False):
        super().__init__()
        self.is_pyramid = type(config) in MODEL_FOR_BACKBONE_MAPPING  # and so what anybody has registered
        self.dilated = dilated
        self.frozen = False
        config = copy.deepcopy(config)  # AutoBackbone writes into what it is given
        config.dtype = None  # that of the whole detector, not the one the backbone was saved in
        if self.is_pyramid:
            self._adopt(AutoBackbone.from_config(config))
        else:
            self._adopt(AutoModel.from_config(config, add_pooling_layer=False))

    def _adopt(self, model: nn.Module) -> None:
        self.model = model
        if self.is_pyramid:
            self.num_channels = model.channels[-1]
        else:
            self.num_channels = model.config.hidden_size
        for module in model.modules():
            if isinstance(module, ResNetConvLayer | ResNetShortCut):
                module.forward = partial(_convolve, module)
        if self.dilated:
            for module in model.encoder.stages[-1].modules():
                if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                    module.stride = (1, 1)
                elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                    module.dilation = module.padding = (2, 2)

    def load_pretrained(self, name: str) -> None:
        """Replaces the weights by those of a hub model or local folder. Raises UserError if some are missing."""
        options = {"config": self.model.config, "dtype": self.model.dtype, "output_loading_info": True}
        try:
            if self.model.config.model_type == "timm_backbone":
                self._load_timm(name)
                return
            if self.is_pyramid:
                # Not AutoBackbone.from_pretrained: it asks the hub whether `name` is a repository, even for a folder.
                model, loading = type(self.model).from_pretrained(name, **options)
            else:
                model, loading = AutoModel.from_pretrained(name, add_pooling_layer=False, **options)
        except Exception as error:  # missing, damaged or foreign files fail in many ways
            raise UserError(f"--backbone {name}: its weights cannot be loaded ({error})") from None
        # Backbones norm their features, which classifiers do not.
        if missing := [key for key in loading["missing_keys"] if "hidden_states_norms" not in key]:
            raise UserError(f"--backbone {name}: lacks the weights {', '.join(sorted(missing)[:3])}")
        self._adopt(model)

    def _load_timm(self, name: str) -> None:
        import timm  # an extra: only those who name such a backbone need it

        config = self.model.config
        file = cached_file(name, "model.safetensors")
        self.model._backbone = timm.create_model(
            config.backbone,
            pretrained=True,
            pretrained_cfg_overlay={"file": file},
            features_only=True,
            out_indices=config.out_indices,
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.is_pyramid:
                # Convolutions are faster on channels that lie side by side, and pass the layout on.
                return self.model(pixels.contiguous(memory_format=torch.channels_last)).feature_maps[-1]
            # Patch tokens come last, after the class token (and registers, where a model has any).
            tokens = self.model(pixels, interpolate_pos_encoding=True).last_hidden_state
            height, width = (length // self.model.config.patch_size for length in pixels.shape[-2:])
            return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))

    def layer_of_parameters(self) -> dict[str, tuple[int, int]]:
        """By name: the stage of a parameter (the layer of a ViT, which has none), counted from 0, and how deep in the
        network its layer is. What comes before the first stage has -1 and 0."""
        places, stages, layers, layer = {}, [-1], [()], ()
        for name, _ in self.named_parameters():  # in the order of the network
            numbers = _NUMBERED.findall(name)
            if numbers and "hidden_states_norms" not in name:  # which belong to the last layer
                layer = tuple(numbers[:2])  # a ResNet's layers are made of layers
                stages += [layer[0]] if layer[0] not in stages else []
                layers += [layer] if layer not in layers else []
            places[name] = stages.index(layer[0]) - 1 if layer else -1, layers.index(layer)
        return places

    def prepare_for_training(
        self,
        freeze: bool,
        batch_norm: BatchNorm,
        world_size: int,
        device: torch.device,
        image_size: int,
        frozen_stages: int = 0,
    ) -> None:
        """Decides what learns. Not part of the config: a trained detector does not depend on it.

        freeze          nothing in the backbone learns, and its norms and dropout are those of evaluation
        frozen_stages   so many stages (layers of a ViT), and what comes before them, do not learn
        batch_norm      sync    learns, statistics over all processes (as the authors do; on GPUs, else local)
                        local   learns, statistics of each process's own images
                        frozen  does not learn, keeps its statistics
        """
        self.frozen = freeze
        if frozen_stages:
            places = self.layer_of_parameters()
            if frozen_stages > (last := max(stage for stage, _ in places.values())):
                raise UserError(f"--frozen_stages {frozen_stages}: at most {last} here; or use --freeze_backbone")
            for name, parameter in self.named_parameters():
                if places[name][0] < frozen_stages:
                    parameter.requires_grad_(False)
        if freeze:
            self.requires_grad_(False)
        elif batch_norm == "frozen":
            for norm in self._batch_norms():
                norm.requires_grad_(False)
        elif batch_norm == "sync" and world_size > 1 and device.type == "cuda":
            self.model = _synchronised(self.model)
        self._freeze_what_no_gradient_reaches(image_size)
        self.train(self.training)

    def _batch_norms(self) -> list[nn.Module]:
        # By name too: some models bring a class of their own.
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d) or "BatchNorm" in type(m).__name__]

    def _freeze_what_no_gradient_reaches(self, image_size: int) -> None:
        """Mask tokens, classifiers' norms and the like. DDP refuses parameters without gradient, and weight decay
        would eat them."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not learning:
            return
        patch = getattr(self.model.config, "patch_size", None)
        side = max(64, 2 * patch) if isinstance(patch, int) else 64
        if self.model.config.model_type == "timm_backbone":  # which may take no other size than its own
            side = image_size
        reference, was_training = next(self.parameters()), self.training
        pixels = torch.rand(1, 3, side, side, device=reference.device, dtype=reference.dtype)
        features = self.eval()(pixels)
        gradients = torch.autograd.grad(features.sum(), learning, allow_unused=True)
        self.train(was_training)
        for parameter, gradient in zip(learning, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def train(self, mode: bool = True) -> "VisionBackbone":
        super().train(mode and not self.frozen)
        for norm in self._batch_norms():
            if not any(parameter.requires_grad for parameter in norm.parameters()):
                norm.eval()  # what does not learn keeps its statistics
        return self


def _convolve(self: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """The forward of a ResNet's convolution and batch norm. In training, a norm that does not learn is folded into the
    convolution before it: the pass over the features, there and back, costs more than one over the weights."""
    convolution, norm = self.convolution, self.normalization
    if norm.training or norm.weight.requires_grad or not torch.is_grad_enabled():
        return type(self).forward(self, features)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    features = F.conv2d(
        *(features, convolution.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale),
        *(convolution.stride, convolution.padding, convolution.dilation),
    )
    return self.activation(features) if hasattr(self, "activation") else features


def _synchronised(model: nn.Module) -> nn.Module:
    if model.config.model_type == "timm_backbone":
        from timm.layers import convert_sync_batchnorm  # knows timm's norms, which hold an activation as well

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
