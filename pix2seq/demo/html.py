"""HTML and CSS of the demo page."""

import base64
import html
import io

import numpy as np
from PIL import Image

from pix2seq.demo.worker import ObjectTokens
from pix2seq.tokenizer import SLOTS
from pix2seq.visualization import PALETTE

INTRODUCTION = (
    "<h1>pix2seq</h1><p>Object detection as language modelling: a decoder predicts five tokens per object, "
    "<b>y1 x1 y2 x2 class</b>. Coordinates are bins: 0 is the top or left edge of the padded square, {last_bin} the "
    "bottom or right edge. Grey rows are noise objects.</p>"
)
# Boxes are hidden by CSS, so that the slider needs no request.
SET_THRESHOLD = "value => { document.documentElement.style.setProperty('--threshold', value); return []; }"
CSS = f"""
.gradio-container {{ max-width: 1240px !important; margin: auto; }}
.html-container {{ padding: 0 !important; }}
.introduction h1 {{ font-size: 30px; font-weight: 700; margin: 6px 0 2px; }}
.introduction p {{ color: var(--body-text-color-subdued); margin: 0 0 8px; font-size: 15px; }}
.image {{ position: relative; width: 100%; border-radius: 8px; overflow: hidden; background: #EEE; }}
.image img {{ display: block; width: 100%; }}
.image .box {{ position: absolute; border: 3px solid var(--color); box-sizing: border-box;
  box-shadow: 0 0 0 1px #0005, inset 0 0 0 1px #0005;
  transition: opacity .15s; opacity: calc((var(--score) - var(--threshold)) * 1e6); }}
.image .box.noise {{ border-style: dashed; border-width: 2px; }}
.image .box b {{ position: absolute; left: -3px; bottom: 100%; background: var(--color); color: #000; z-index: 1;
  font: 600 13px/20px system-ui, sans-serif; padding: 0 6px; white-space: nowrap; }}
.image .box.top b {{ bottom: auto; top: 0; }}
.image .box.right b {{ left: auto; right: -3px; }}
.sequence {{ max-height: 480px; overflow-y: auto; }}
.sequence table {{ width: 100%; margin: 0; border: 0; border-collapse: separate; border-spacing: 4px;
  table-layout: fixed; }}
.sequence th {{ color: var(--body-text-color-subdued); font-weight: 500; font-size: 13px; text-align: left;
  padding: 0 8px; border: 0; position: sticky; top: 0; background: var(--body-background-fill); }}
.sequence th:nth-child(5) {{ width: 30%; }}
.sequence tr {{ border: 0; opacity: clamp(.4, calc((var(--score) - var(--threshold)) * 1e6), 1); }}
.sequence td {{ background: color-mix(in srgb, var(--color) 35%, white); color: #111; border: 0; border-radius: 5px;
  padding: 4px 8px; font: 15px/22px ui-monospace, Menlo, Consolas, monospace; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }}
.sequence td:nth-child(5) {{ background: var(--color); font-weight: 700; }}
.sequence tr.noise td {{ background: #EDEDED; color: #888; font-weight: 400; }}
.sequence tr.incomplete td {{ background: #E3E7EE; font-weight: 400; }}
.sequence td.score, .sequence tr.noise td.score {{ background: none; color: var(--body-text-color-subdued); }}
.status {{ color: var(--body-text-color-subdued); font-size: 14px; margin: 0 0 6px 12px; }}
.error {{ border-left: 4px solid {PALETTE[5]}; background: {PALETTE[5]}18; padding: 12px 16px; }}
"""


def image_html(image: Image.Image) -> str:
    """The image in an element that is not closed: the boxes are appended to it, and gradio sends only what is new."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<div class="image"><img alt="uploaded image" src="data:image/jpeg;base64,{encoded}">'


def boxes_html(objects: list[ObjectTokens], size: tuple[int, int]) -> str:
    """The boxes of the complete objects on an image of `size` (height, width)."""
    parts = []
    for item in objects:
        if item.box is None:
            continue
        x1, y1, x2, y2 = (100 * item.box / np.array([size[1], size[0]] * 2)).tolist()
        classes = f"box{' noise' * item.is_noise}{' top' * (y1 < 6)}{' right' * (x1 > 50)}"
        position = f"left:{x1:.2f}%;top:{y1:.2f}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%"
        caption = "noise" if item.is_noise else f"{html.escape(item.name)} {item.score:.2f}"
        style = f"{position};--color:{item.color};--score:{item.score:.4f}"
        parts.append(f'<div class="{classes}" style="{style}"><b>{caption}</b></div>')
    return "".join(parts)


def sequence_html(objects: list[ObjectTokens]) -> str:
    """A table with a row for each object: its tokens and its score."""
    rows = []
    for item in objects:
        state = "incomplete" if item.box is None else "noise" if item.is_noise else "object"
        cells = "".join(f"<td>{html.escape(token)}</td>" for token in item.tokens)
        score = "" if item.box is None else f'<td class="score">{item.score:.2f}</td>'
        rows.append(f'<tr class="{state}" style="--color:{item.color};--score:{item.score:.4f}">{cells}{score}</tr>')
    head = "".join(f"<th>{name}</th>" for name in (*SLOTS, "score"))
    count = sum(len(item.tokens) for item in objects)
    return (
        f'<p class="status">{count} tokens</p><div class="sequence"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def waiting_html(queue_position: int) -> str:
    return f'<p class="status">images before yours: {queue_position}</p>'


def error_html(message: str) -> str:
    return f'<p class="error">{html.escape(message)}</p>'
