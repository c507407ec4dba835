"""Fuses the feature maps of a backbone into one, and refines it with convolutions."""

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = 4  # of the group norms: divides every width that the position embedding allows


class ResidualConv(nn.Module):
    """3x3 convolution, group norm and GELU on a residual branch."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + F.gelu(self.norm(self.conv(features)))


class FeaturePyramid(nn.Module):
    """Fuses feature maps of different strides at one of these strides, as feature pyramid networks do (1612.03144).

    Coarser maps are upsampled, finer ones are downsampled by a strided convolution, and all are added. Convolutions
    then mix neighboring cells, which a decoder that looks up single cells cannot do.

    Args:
        in_channels: Channels of the feature maps, finest first. The stride doubles from one to the next.
        level: Index of the feature map whose stride the result has.
        channels: Channels C of the result.
        num_layers: Number of residual convolutions.
    """

    def __init__(self, in_channels: list[int], level: int, channels: int, num_layers: int):
        super().__init__()
        strides = [2 ** max(level - index, 0) for index in range(len(in_channels))]
        self.level = level
        self.laterals = nn.ModuleList(
            nn.Conv2d(width, channels, kernel_size=stride, stride=stride)
            for width, stride in zip(in_channels, strides, strict=True)
        )
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.layers = nn.Sequential(*(ResidualConv(channels) for _ in range(num_layers)))

    def forward(self, feature_maps: list[torch.Tensor]) -> torch.Tensor:
        """Fuses feature maps, each (B, C_i, h_i, w_i), into one (B, C, h, w)."""
        size = feature_maps[self.level].shape[-2:]
        laterals = [lateral(features) for lateral, features in zip(self.laterals, feature_maps, strict=True)]
        fused = sum(
            features if features.shape[-2:] == size else F.interpolate(features, size, mode="bilinear")
            for features in laterals
        )
        return self.layers(self.norm(fused))
