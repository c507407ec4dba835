"""Pictures: boxes on images, and grids of them. Knows pixels and names, nothing of models or datasets."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette: told apart with any kind of colour vision.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
GREY = "#8A8A8A"
MARGIN = 8
CELL = 320  # side of a picture in a grid
TITLE, CAPTION = 28, 24  # pixels for what stands over a column, and over a picture
IN_A_ROW = 7  # pictures of a strip


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray,
    names: Sequence[str],
    colors: Sequence[str],
    dashed: Sequence[bool] | None = None,
    font_size: int = 12,
    width: int | None = None,
    names_below: bool = False,
) -> Image.Image:
    """A copy of the image with boxes (N, 4) xyxy in its pixels; `dashed` ones are drawn as such.

    Lines are `width` pixels wide, by default what suits the image; 0: no lines. Names stand over their boxes, or below
    them.
    """
    image = image.convert("RGB")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(font_size)
    width = max(1, round(min(image.size) / 160)) if width is None else width
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    # Edges far beyond the picture are as invisible just beyond it, and drawn in a moment.
    near = boxes.clip(-width - 1, np.array(image.size * 2) + width + 1)
    for index, (x1, y1, x2, y2) in enumerate(near):
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)
        if dashed is not None and dashed[index]:
            _dashed_rectangle(draw, (x1, y1, x2, y2), colors[index])
        else:
            draw.rectangle((x1, y1, x2, y2), outline=colors[index], width=width)
    # Names after all boxes, so that no box crosses a name.
    for index, (x1, y1, _, y2) in enumerate(boxes):
        if names[index]:
            left, top, right, bottom = draw.textbbox((0, 0), names[index], font=font)
            x = min(max(x1, 0), max(image.width - right - 2, 0))
            y = y2 + 1 if names_below else y1 - bottom - 2
            y = min(max(y, 0), image.height - bottom - 2)
            draw.rectangle((x, y, x + right + 2, y + bottom + 2), fill=colors[index])
            draw.text((x + 1, y + 1), names[index], fill="black", font=font)
    return image


def color_of(label: int) -> str:
    """A label's colour; grey for noise (-1)."""
    return PALETTE[label % len(PALETTE)] if label >= 0 else GREY


def grid(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = (),
    cell: int | None = None,
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Images in rows on white, each fitted into a square cell, with a title over each column and a caption over each
    image."""
    cell = cell or max(max(image.size) for row in rows for image in row)
    font = ImageFont.load_default(16)
    top = TITLE if titles else 0
    high = cell + MARGIN + (CAPTION if captions else 0)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, len(rows) * high + MARGIN + top), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((MARGIN + column * (cell + MARGIN), 6), title, fill="black", font=font)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            image = image.copy()
            image.thumbnail((cell, cell))
            sheet.paste(image, (MARGIN + c * (cell + MARGIN), top + (r + 1) * high - cell))
    small = ImageFont.load_default(14)
    for r, row in enumerate(captions):
        for c, caption in enumerate(row):
            place = (MARGIN + c * (cell + MARGIN), top + r * high + MARGIN)
            draw.text(place, _fitted(caption, small, cell), fill="black", font=small)
    return sheet


def side_by_side(
    pairs: Sequence[tuple[Image.Image, Image.Image]], columns: int = 2, cell: int = CELL, title: str = "predictions"
) -> Image.Image:
    """Pairs of (ground truth, predictions), `columns` pairs in a row. `title` stands over the predictions."""
    rows = [[image for pair in pairs[i : i + columns] for image in pair] for i in range(0, len(pairs), columns)]
    titles = ["ground truth", title] * min(columns, len(pairs))
    return grid(rows, titles, cell)


def pair_of(sheet: Image.Image, number: int, columns: int = 2, cell: int = CELL) -> list[Image.Image]:
    """Of what `side_by_side` gives, the cells of one pair."""
    row, column = divmod(number, columns)
    top = TITLE + MARGIN + row * (cell + MARGIN)
    lefts = [MARGIN + (2 * column + side) * (cell + MARGIN) for side in (0, 1)]
    return [sheet.crop((left, top, left + cell, top + cell)) for left in lefts]


def strip(sheets: dict[int, Image.Image], number: int) -> Image.Image:
    """One picture over the steps: its ground truth, and its predictions in each of the sheets, which are what
    `side_by_side` gave at that step."""
    pairs = {step: pair_of(sheet, number) for step, sheet in sorted(sheets.items())}
    cells = [next(iter(pairs.values()))[0], *(predicted for _, predicted in pairs.values())]
    captions = ["ground truth", *(f"step {step:,}" for step in pairs)]
    starts = range(0, len(cells), IN_A_ROW)
    cells, captions = ([row[start : start + IN_A_ROW] for start in starts] for row in (cells, captions))
    return grid(cells, cell=CELL, captions=captions)


def enlarge(image: Image.Image, boxes: np.ndarray, side: int) -> tuple[Image.Image, np.ndarray]:
    """Image and boxes scaled so that the longer side is `side`: names drawn on it are legible whatever its size."""
    scale = side / max(image.size)
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.BICUBIC), np.asarray(boxes, dtype=float).reshape(-1, 4) * scale


def draw_examples(
    images: Sequence[Image.Image], objects: Sequence[tuple[np.ndarray, np.ndarray]], names: Sequence[str]
) -> Image.Image:
    """Training examples, four in a row: canvases with their (boxes (N, 4) xyxy in [0, 1], labels (N,)).

    Noise objects (label -1) are drawn first, grey and dashed, without a name.
    """
    drawn = []
    for image, (boxes, labels) in zip(images, objects, strict=True):
        order = np.argsort(labels, kind="stable")
        image, boxes = enlarge(image, boxes[order] * image.width, CELL)
        labels = labels[order]
        captions = ["" if label < 0 else names[label] for label in labels]
        drawn.append(draw_boxes(image, boxes, captions, [color_of(label) for label in labels], labels < 0))
    return grid([drawn[start : start + 4] for start in range(0, len(drawn), 4)], cell=CELL)


def sequence_table(
    lines: Sequence[tuple[Sequence[str], Sequence[bool], str, str]], rest: str, side: int
) -> Image.Image:
    """A sentence as a table in a square of `side` pixels, an object a line: (its tokens as words, whether each has
    weight, its colour, what it is). `rest` tells what is left out."""
    sheet = Image.new("RGB", (side, side), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    columns = (0, 0.115, 0.23, 0.345, 0.46, 0.72)  # of the side: where the cells begin, and what the line is
    for left, name in zip(columns, ("y1", "x1", "y2", "x2", "class"), strict=False):
        draw.text((left * side + 4, 4), name, fill="#777777", font=font)
    y = 24
    for cells, weighted, color, meaning in lines:
        for left, right, cell, has_weight in zip(columns, columns[1:], cells, weighted, strict=False):
            box = (left * side, y, right * side - 4, y + 26)
            draw.rectangle(box, fill=color if has_weight else "#EEEEEE")
            cell = _fitted(cell, font, box[2] - box[0] - 8)
            draw.text((box[0] + 5, y + 6), cell, fill="black" if has_weight else "#999999", font=font)
        draw.text((columns[-1] * side + 6, y + 6), meaning, fill="black" if all(weighted) else "#777777", font=font)
        y += 32
    if rest:
        draw.text((4, y + 4), f"... {rest}", fill="#777777", font=font)
    return sheet


def paragraph(text: str, width: int, font_size: int = 14) -> Image.Image:
    """Text broken into lines of at most `width` pixels, on white."""
    font, lines = ImageFont.load_default(font_size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width - 2 * MARGIN else [*lines, word]
    sheet = Image.new("RGB", (width, len(lines) * (font_size + 6) + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + row * (font_size + 6)), line, fill="black", font=font)
    return sheet


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """What of the text is at most so many pixels wide."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text


def _dashed_rectangle(draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], color: str) -> None:
    """White between the dashes, so that they are seen on any ground."""
    x1, y1, x2, y2 = box
    dash = 4
    draw.rectangle(box, outline="white")
    for x in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((x, y, min(x + dash, x2), y), fill=color)
    for y in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + dash, y2)), fill=color)
