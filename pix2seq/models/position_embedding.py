"""Where on the canvas: fixed codes of coordinates and of the cells of a grid."""

import math
from typing import Literal

import torch

PositionEmbeddingType = Literal["original", "fine"]
BinInit = Literal["random", "sine"]


def coordinate_embedding(coordinates: torch.Tensor, channels: int, kind: PositionEmbeddingType) -> torch.Tensor:
    """Coordinates (N,) in [0, 1] of the canvas -> fixed code (N, channels), all sines before all cosines.

    original   the authors': wave lengths from one canvas to 10000 canvases
    ruler      wave lengths from four canvases to an eighth of one, so that places near each other can be told apart
    """
    steps = torch.arange(channels // 2, device=coordinates.device) / (channels // 2)
    cycles = 10000.0**-steps if kind == "original" else 0.25 * 32.0**steps
    angles = 2 * math.pi * coordinates[:, None] * cycles
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_embedding_2d(
    height: int, width: int, channels: int, kind: PositionEmbeddingType, device=None
) -> torch.Tensor:
    """Code of the cells of a grid (height * width, channels): the first half of the channels tells y, the second x.

    Depends on the place on the canvas, not on the canvas size, so weights can be moved to another size. The authors
    put the first and the last cell on the edges; on the ruler a cell lies where its centre is, as a bin does.
    """

    def code(length: int) -> torch.Tensor:
        cells = torch.arange(length, device=device)
        coordinates = cells / max(length - 1, 1) if kind == "original" else (cells + 0.5) / length
        return coordinate_embedding(coordinates, channels // 2, kind)

    y = code(height)[:, None].expand(height, width, channels // 2)
    x = code(width)[None].expand(height, width, channels // 2)
    return torch.cat([y, x], dim=2).reshape(height * width, channels)
