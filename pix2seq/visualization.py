"""Drawing functions: boxes on images, grids of images and tables of tokens, in one palette for the whole project."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which is distinguishable with any kind of color vision.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
ORANGE, SKY_BLUE, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = PALETTE
CORRECT, WRONG = SKY_BLUE, ORANGE  # black text is legible on both
GREY = "#8A8A8A"  # noise objects and unreadable images
LIGHT_GREY, TEXT_GREY = "#EEEEEE", "#777777"

MARGIN = 8  # pixels between the images of a grid
CELL = 320  # side of an image in a grid
TITLE_HEIGHT = 28  # pixels above a column
EXAMPLE_COLUMNS = 4  # images in a row of `draw_examples`


class TableRow(NamedTuple):
    """One object in `sequence_table`.

    Args:
        tokens: Text of its tokens, y1 x1 y2 x2 class.
        has_weight: For each token, whether it has a weight in the loss.
        color: Color of the cells.
        description: Text beside the cells.
    """

    tokens: Sequence[str]
    has_weight: Sequence[bool]
    color: str
    description: str


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    names: Sequence[str],
    colors: Sequence[str],
    dashed: Sequence[bool] | np.ndarray | None = None,
    font_size: int = 12,
    width: int | None = None,
    names_below: bool = False,
) -> Image.Image:
    """Draws boxes and their names on a copy of an image.

    Args:
        image: The image, which is not changed.
        boxes: (N, 4) xyxy in pixels of the image; they may lie outside it.
        names: Text at each box, "" for none.
        colors: Color of each box.
        dashed: Whether to draw each box with dashed lines. Default: none.
        font_size: Height of the names in pixels.
        width: Width of the lines in pixels, 0 for names only. Default: in proportion to the image.
        names_below: Draw names below their boxes instead of above.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(font_size)
    width = max(1, round(min(image.size) / 160)) if width is None else width
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    # Clipping far edges to just outside the image changes no pixel, and Pillow is slow with long lines.
    clipped = boxes.clip(-width - 1, np.array(image.size * 2) + width + 1)
    for index, (x1, y1, x2, y2) in enumerate(clipped):
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
        if dashed is not None and dashed[index]:
            _draw_dashed_rectangle(draw, (x1, y1, x2, y2), colors[index])
        else:
            draw.rectangle((x1, y1, x2, y2), outline=colors[index], width=width)
    # Names after all boxes, so that no box crosses a name.
    for index, (x1, y1, _, y2) in enumerate(boxes):
        if names[index]:
            _, _, right, bottom = draw.textbbox((0, 0), names[index], font=font)
            x = min(max(x1, 0), max(image.width - right - 2, 0))
            y = y2 + 1 if names_below else y1 - bottom - 2
            y = min(max(y, 0), image.height - bottom - 2)
            draw.rectangle((x, y, x + right + 2, y + bottom + 2), fill=colors[index])
            draw.text((x + 1, y + 1), names[index], fill="black", font=font)
    return image


def color_of(label: int) -> str:
    """Returns the color of a class label, grey for noise objects (-1)."""
    return PALETTE[label % len(PALETTE)] if label >= 0 else GREY


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), cell: int | None = None) -> Image.Image:
    """Arranges images in rows on a white background.

    Args:
        rows: Images of each row; rows may differ in length.
        titles: Text above each column.
        cell: Side of the square that each image is scaled down to. Default: the longest side of all images.
    """
    cell = cell or max(max(image.size) for row in rows for image in row)
    top = TITLE_HEIGHT if titles else 0
    pitch = cell + MARGIN
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * pitch + MARGIN, len(rows) * pitch + MARGIN + top), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * pitch, 6), title, fill="black", font=ImageFont.load_default(16))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            image = image.copy()
            image.thumbnail((cell, cell))
            sheet.paste(image, (MARGIN + column * pitch, top + (row + 1) * pitch - cell))
    return sheet


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Stacks images vertically, centered on a white background."""
    width = max(image.width for image in images)
    sheet = Image.new("RGB", (width, sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, ((width - image.width) // 2, top))
        top += image.height
    return sheet


def side_by_side(
    pairs: Sequence[tuple[Image.Image, Image.Image]], columns: int = 2, cell: int = CELL, title: str = "predictions"
) -> Image.Image:
    """Arranges pairs of (ground truth, predictions) in a grid, `columns` pairs in a row.

    Args:
        pairs: Images with ground truth, and the same images with predictions.
        columns: Pairs in a row.
        cell: Side of an image in the grid.
        title: Text above the columns of predictions.
    """
    rows = [[image for pair in pairs[i : i + columns] for image in pair] for i in range(0, len(pairs), columns)]
    titles = ["ground truth", title] * min(columns, len(pairs))
    return grid(rows, titles, cell)


def enlarge(image: Image.Image, boxes: np.ndarray, side: int) -> tuple[Image.Image, np.ndarray]:
    """Scales an image and its boxes so that the longer side is `side` pixels, for legible names on small images.

    Returns:
        The scaled image, and the boxes (N, 4) in its pixels.
    """
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC), np.asarray(boxes, dtype=float).reshape(-1, 4) * scale


def draw_examples(
    images: Sequence[Image.Image], objects: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str]
) -> Image.Image:
    """Draws training examples in a grid. Noise objects are drawn first, grey and dashed, without a name.

    Args:
        images: Padded square images.
        objects: Boxes (N, 4) xyxy in [0, 1] and labels (N,) of each image; label -1 marks a noise object.
        names: Class names by label.
    """
    drawn = []
    for image, (boxes, labels) in zip(images, objects, strict=True):
        order = np.argsort(labels, kind="stable")
        image, boxes = enlarge(image, boxes[order] * image.width, CELL)
        labels = labels[order]
        captions = ["" if label < 0 else names[label] for label in labels]
        drawn.append(draw_boxes(image, boxes, captions, [color_of(label) for label in labels], labels < 0))
    return grid(_in_rows(drawn, EXAMPLE_COLUMNS), cell=CELL)


def sequence_table(rows: Sequence[TableRow], footer: str, side: int) -> Image.Image:
    """Draws a token sequence as a table, one object a row. Tokens without a loss weight are pale.

    Args:
        rows: The objects.
        footer: Text below the table, "" for none.
        side: Side of the square image in pixels.
    """
    sheet = Image.new("RGB", (side, side), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    edges = [fraction * side for fraction in (0, 0.115, 0.23, 0.345, 0.46, 0.72)]  # of the five cells
    for left, name in zip(edges, ("y1", "x1", "y2", "x2", "class"), strict=False):
        draw.text((left + 4, 4), name, fill=TEXT_GREY, font=font)
    y = 24
    for row in rows:
        for left, right, text, has_weight in zip(edges, edges[1:], row.tokens, row.has_weight, strict=False):
            box = (left, y, right - 4, y + 26)
            draw.rectangle(box, fill=row.color if has_weight else LIGHT_GREY)
            text = _truncate(text, font, box[2] - box[0] - 8)
            draw.text((box[0] + 5, y + 6), text, fill="black" if has_weight else "#999999", font=font)
        color = "black" if all(row.has_weight) else TEXT_GREY
        draw.text((edges[-1] + 6, y + 6), row.description, fill=color, font=font)
        y += 32
    if footer:
        draw.text((4, y + 4), footer, fill=TEXT_GREY, font=font)
    return sheet


def paragraph(text: str, width: int, font_size: int = 14) -> Image.Image:
    """Draws text on white, wrapped to `width` pixels."""
    font, lines = ImageFont.load_default(font_size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width - 2 * MARGIN else [*lines, word]
    sheet = Image.new("RGB", (width, len(lines) * (font_size + 6) + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + row * (font_size + 6)), line, fill="black", font=font)
    return sheet


def figure_to_image(figure: "Figure") -> Image.Image:
    """Renders a matplotlib figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the font draws an empty box for these characters
        figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _in_rows(items: Sequence, columns: int) -> list[Sequence]:
    return [items[start : start + columns] for start in range(0, len(items), columns)]


def _truncate(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Shortens a text to `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


def _draw_dashed_rectangle(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], color: str) -> None:
    """Draws dashes on a white line, which is visible on any background."""
    x1, y1, x2, y2 = box
    dash = 4
    draw.rectangle(box, outline="white")
    for x in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((x, y, min(x + dash, x2), y), fill=color)
    for y in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + dash, y2)), fill=color)
