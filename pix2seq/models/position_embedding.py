"""Fixed sine embeddings of coordinates and of the cells of a feature map."""

import math
from typing import Literal

import torch

PositionEmbeddingType = Literal["original", "fine"]
BinInit = Literal["random", "sine"]


def coordinate_embedding(
    coordinates: torch.Tensor, channels: int, embedding_type: PositionEmbeddingType
) -> torch.Tensor:
    """Computes the sine embedding of coordinates.

    Args:
        coordinates: Coordinates (N,) in [0, 1] of the padded image.
        channels: Number of channels D, an even number.
        embedding_type: "original" has the authors' wavelengths, from 1 to 10000 image sides. "fine" has wavelengths
            from 4 image sides to an eighth of one, which separates neighboring positions.

    Returns:
        Embeddings (N, D), all sines before all cosines.
    """
    steps = torch.arange(channels // 2, device=coordinates.device) / (channels // 2)
    frequencies = 10000.0**-steps if embedding_type == "original" else 0.25 * 32.0**steps
    angles = 2 * math.pi * coordinates[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_embedding_2d(
    height: int, width: int, channels: int, embedding_type: PositionEmbeddingType, device=None
) -> torch.Tensor:
    """Computes the embeddings of the cells of a feature map: y in the first half of the channels, x in the second.

    Coordinates are relative to the padded image, so weights can be transferred to another image size. With "original",
    the cells are spaced from 0 to 1, as in the authors' code; with "fine", cell centers are used, as for bins.

    Args:
        height: Number of rows h of the feature map.
        width: Number of columns w of the feature map.
        channels: Number of channels D, a multiple of 4.
        embedding_type: See `coordinate_embedding`.
        device: Device of the result.

    Returns:
        Embeddings (h * w, D), row by row.
    """

    def embed_axis(length: int) -> torch.Tensor:
        cells = torch.arange(length, device=device)
        coordinates = cells / max(length - 1, 1) if embedding_type == "original" else (cells + 0.5) / length
        return coordinate_embedding(coordinates, channels // 2, embedding_type)

    y = embed_axis(height)[:, None].expand(height, width, channels // 2)
    x = embed_axis(width)[None].expand(height, width, channels // 2)
    return torch.cat([y, x], dim=2).reshape(height * width, channels)
