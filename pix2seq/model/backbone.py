"""Hugging Face vision models as maps from pixels to a grid of features."""

from dataclasses import dataclass

import torch
import yaml
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from pix2seq.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class BackboneChoice:
    """A backbone by its config, the pixels it expects and, if it is a pretrained one, where its weights are."""

    config: PretrainedConfig
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    pretrained: str | None = None


def choose_backbone(name: str) -> BackboneChoice:
    """A hub name or local folder, whose weights are used, or an inline config like "{model_type: resnet}".

    Raises UserError if it is none of these.
    """
    try:
        if name.lstrip().startswith("{"):
            return BackboneChoice(AutoConfig.for_model(**yaml.safe_load(name)))
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # a config's constructor may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--backbone {name}: no such hub model, local folder or inline config ({reason})") from None
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):  # a folder with nothing but a model
        return BackboneChoice(config, pretrained=name)
    return BackboneChoice(config, tuple(processor.image_mean), tuple(processor.image_std), name)


class VisionBackbone(nn.Module):
    """(B, 3, S, S) pixels -> (B, C, h, w) features: the last stage of a pyramid, or a ViT's patch tokens.

    ResNets and ViTs are tested; other models whose interface is the same work too.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.is_pyramid = config.model_type in MODEL_FOR_BACKBONE_MAPPING_NAMES
        if self.is_pyramid:
            self.model = AutoBackbone.from_config(config)
            self.num_channels = self.model.channels[-1]
        else:
            self.model = AutoModel.from_config(config, add_pooling_layer=False)
            self.num_channels = config.hidden_size

    def load_pretrained(self, name: str) -> None:
        """Replaces the weights by those of a hub model or local folder. Raises UserError if there are none."""
        config, dtype = self.model.config, self.model.dtype
        try:
            if self.is_pyramid:
                # Not AutoBackbone.from_pretrained: it asks the hub whether `name` is a repository, even for a folder.
                self.model = type(self.model).from_pretrained(name, config=config, dtype=dtype)
            else:
                self.model = AutoModel.from_pretrained(name, config=config, dtype=dtype, add_pooling_layer=False)
        except Exception as error:  # missing, damaged or foreign files fail in many ways
            raise UserError(f"--backbone {name}: its weights cannot be loaded ({error})") from None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.is_pyramid:
            return self.model(pixels).feature_maps[-1]
        # Patch tokens come last, after the class token (and registers, where a model has any).
        tokens = self.model(pixels, interpolate_pos_encoding=True).last_hidden_state
        height, width = (length // self.model.config.patch_size for length in pixels.shape[-2:])
        return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width))
