"""Richer drawings than those of `shapes`: for pretraining before a small real dataset.

The objects of an image have similar sizes and often a common appearance, like cells or parts on a belt. They have
textures, may hide each other in part, and may be cut off by the border.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

KINDS = ("ellipse", "rectangle", "triangle", "cross", "ring", "star", "blob")
FILLS = ("plain", "gradient", "stripes", "noise", "outline")

MIN_SIZE, MAX_SIZE = 0.04, 0.59  # mean side of the objects of an image, relative to the image
MIN_PIXELS = 10  # mean side below which the kinds look alike
MIN_VISIBLE = 0.6  # share of each object that is inside the image and not hidden by others
MAX_FILLED = 0.7  # share of the image that the boxes may have together
MAX_ATTEMPTS = 15  # to place an object
MIN_CONTRAST = 60  # between the colors of an object and the mean color of the background, in one channel of 255
STROKE = 0.09  # width of the lines of hollow objects, relative to their shorter side
_CROSS = np.array([(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]) / 3
_SUPERSAMPLING = 2  # of the masks


@dataclass(frozen=True)
class Appearance:
    """What the objects of a group have in common.

    Args:
        kind: Index in `KINDS`.
        fill: One of `FILLS`.
        colors: Two RGB colors (2, 3).
        has_spot: Whether objects have a spot, like the nucleus of a cell.
        seed: Seed of the outline of a blob.
    """

    kind: int
    fill: str
    colors: np.ndarray
    has_spot: bool
    seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator, background: np.ndarray) -> "Appearance":
        """Draws a random appearance whose colors differ from the color (3,) of the background."""
        kind = int(rng.integers(len(KINDS)))
        fills = FILLS[:-1] if KINDS[kind] == "ellipse" else FILLS  # the outline of an ellipse is a ring
        colors = rng.integers(0, 256, (2, 3)).astype(np.float32)
        while (np.abs(colors - background).max(axis=1) < MIN_CONTRAST).any():
            colors = rng.integers(0, 256, (2, 3)).astype(np.float32)
        fill = fills[rng.integers(len(fills))]
        return cls(kind, fill, colors, bool(rng.random() < 0.3), int(rng.integers(2**31)))


def draw_rich_image(
    rng: np.random.Generator, size: int, max_shapes: int
) -> tuple[Image.Image, list[tuple[int, tuple[float, float, float, float]]]]:
    """Draws an image.

    Args:
        rng: Random generator.
        size: Side of the image in pixels.
        max_shapes: Largest number of objects.

    Returns:
        The image, and (label, (x1, y1, x2, y2) in pixels) of each object. A box contains the hidden part of an object,
        but not what lies outside the image.
    """
    canvas = _draw_background(rng, size)
    low, high = (max(MIN_PIXELS, share * size) for share in (MIN_SIZE, MAX_SIZE))
    side = np.exp(rng.uniform(np.log(low), np.log(high)))
    groups = [Appearance.draw(rng, canvas.mean(axis=(0, 1))) for _ in range(rng.integers(1, 4))]
    count = rng.integers(1, 1 + max(1, min(max_shapes, int(MAX_FILLED * (size / side) ** 2))))
    owner = np.full((size, size), -1)  # the object that is visible at each pixel
    areas: list[float] = []  # of the whole objects
    objects = []
    for _ in range(count):
        group = groups[rng.integers(len(groups))]
        for _ in range(MAX_ATTEMPTS):
            outline = _outline(group, rng) * side / 2 * rng.uniform(0.75, 1.3) + rng.uniform(0, size, 2)
            corner = np.clip(np.floor(outline.min(axis=0)), 0, size - 1).astype(int)
            opposite = np.clip(np.ceil(outline.max(axis=0)), 1, size).astype(int)
            mask = _mask(outline, corner, opposite, hollow=KINDS[group.kind] == "ring" or group.fill == "outline")
            place = np.s_[corner[1] : opposite[1], corner[0] : opposite[0]]
            covers = mask > 0.5
            area = _polygon_area(outline) * (mask.sum() / max(_mask(outline, corner, opposite).sum(), 1e-6))
            hidden = np.bincount(owner[place][covers & (owner[place] >= 0)], minlength=len(areas))
            visible = np.bincount(owner[owner >= 0], minlength=len(areas)) - hidden
            if covers.sum() < MIN_VISIBLE * area or (visible < MIN_VISIBLE * np.array(areas)).any():
                continue
            owner[place][covers] = len(areas)
            areas.append(area)
            _paint(canvas[place], mask, group, rng)
            objects.append((group.kind, _box(outline, corner, mask)))
            break
    return _finish(canvas, rng), objects


def _draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    cells = int(rng.choice([1, 2, 4, 8, 16]))
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    mean = smooth.mean(axis=(0, 1))
    noise = rng.standard_normal((size, size, 1), dtype=np.float32) * rng.uniform(0, 20)
    return mean + (smooth - mean) * rng.uniform(0.1, 0.8) + noise


def _outline(group: Appearance, rng: np.random.Generator) -> np.ndarray:
    """The outline (K, 2), xy, of an object of about radius 1 around the origin, stretched and rotated."""
    kind = KINDS[group.kind]
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radius = np.ones_like(angles)
    if kind == "rectangle":
        outline = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.9
    elif kind == "triangle":
        outline = np.array([(0, -1), (1, 1), (-1, 1)])
    elif kind == "cross":
        outline = np.concatenate([_CROSS, _CROSS[::-1] * (1, -1), -_CROSS, -_CROSS[::-1] * (1, -1)])
        outline = outline[np.argsort(np.arctan2(outline[:, 1], outline[:, 0]), kind="stable")]
    else:
        if kind == "star":
            radius = np.where(np.arange(48) // 4 % 2 == 0, 1.0, 0.5)
            angles, radius = angles[::4], radius[::4]
        elif kind == "blob":
            waves = np.random.default_rng(group.seed).normal(0, 1, (4, 2)) / np.arange(2, 6)[:, None]
            phases = angles[:, None] * np.arange(1, 5)
            radius = 1 + 0.3 * (np.sin(phases) @ waves[:, 0] + np.cos(phases) @ waves[:, 1]).clip(-2, 2)
        outline = radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    stretch, angle = np.exp(rng.normal(0, 0.15)), rng.uniform(-np.pi, np.pi) if rng.random() < 0.5 else 0.0
    rotation = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    return outline * (stretch, 1 / stretch) @ rotation.T


def _mask(outline: np.ndarray, corner: np.ndarray, opposite: np.ndarray, hollow: bool = False) -> np.ndarray:
    """The opacity (h, w) of an object in a region of the image. Of a hollow object, only a line is opaque."""
    width, height = (opposite - corner) * _SUPERSAMPLING
    image = Image.new("L", (int(width), int(height)))
    points = [tuple(point) for point in (outline - corner) * _SUPERSAMPLING - 0.5]  # of pixel centers
    ImageDraw.Draw(image).polygon(points, fill=255)
    if hollow:  # the inner half of a line along the outline
        line = Image.new("L", image.size)
        stroke = round(2 * _SUPERSAMPLING * max(STROKE * np.ptp(outline, axis=0).min(), 1))
        ImageDraw.Draw(line).line([*points, *points[:2]], fill=255, width=stroke, joint="curve")
        image = ImageChops.darker(image, line)
    mask = np.asarray(image, dtype=np.float32) / 255
    return mask.reshape(height // _SUPERSAMPLING, _SUPERSAMPLING, width // _SUPERSAMPLING, _SUPERSAMPLING).mean((1, 3))


def _box(outline: np.ndarray, corner: np.ndarray, mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box (x1, y1, x2, y2), in pixels, of the part inside the image: the extent of the mask, from `corner` on.

    The outline adds precision below a pixel. It does not suffice: the border may cut off its highest point.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x1, y1 = np.maximum(outline.min(axis=0), corner + np.array([columns[0], rows[0]])).round(1)
    x2, y2 = np.minimum(outline.max(axis=0), corner + np.array([columns[-1], rows[-1]]) + 1).round(1)
    return float(x1), float(y1), float(x2), float(y2)


def _polygon_area(outline: np.ndarray) -> float:
    following = np.roll(outline, -1, axis=0)
    return abs(float((outline[:, 0] * following[:, 1] - outline[:, 1] * following[:, 0]).sum())) / 2


def _paint(region: np.ndarray, mask: np.ndarray, group: Appearance, rng: np.random.Generator) -> None:
    """Paints an object with the opacity `mask` into a region (h, w, 3) of the image."""
    height, width = mask.shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    first, second = group.colors + rng.normal(0, 8, (2, 3)).astype(np.float32)
    share = np.zeros_like(mask)
    if group.fill == "gradient":
        share = x if rng.random() < 0.5 else y
    elif group.fill == "stripes":
        share = (np.sin(2 * np.pi * rng.uniform(2, 6) * (x + rng.uniform(-1, 1) * y)) > 0).astype(np.float32)
    elif group.fill == "noise":
        share = rng.random((height, width), dtype=np.float32)
    color = first + share[..., None] * (second - first)
    if group.has_spot:
        spot = ((x - rng.uniform(0.35, 0.65)) ** 2 + (y - rng.uniform(0.35, 0.65)) ** 2) < 0.03
        color[spot] = second
    opacity = mask[..., None] * rng.uniform(0.75, 1.0)
    region += opacity * (color - region)


def _finish(canvas: np.ndarray, rng: np.random.Generator) -> Image.Image:
    mean, contrast = canvas.mean(), rng.uniform(0.4, 1.1)
    canvas = mean + contrast * (canvas - mean) + rng.normal(0, 15)
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.5)))
    return image
