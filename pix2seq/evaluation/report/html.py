"""Building blocks of a self-contained HTML page: styles and images are embedded, and there are no scripts."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1c2430; font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 28px 64px; }
h1 { margin: 8px 0 0; font-size: 30px; } h2 { margin: 0 0 12px; font-size: 21px; }
h3 { margin: 22px 0 4px; font-size: 16px; }
.subtitle { color: #566173; margin: 2px 0 18px; overflow-wrap: anywhere; }
nav { margin: 0 0 20px; line-height: 2.1; }
nav a { background: #fff; border: 1px solid #d6dbe3; border-radius: 14px; padding: 3px 12px; margin-right: 4px;
  color: #00527f; text-decoration: none; font-size: 14px; white-space: nowrap; }
section { background: #fff; border: 1px solid #e1e5eb; border-radius: 10px; padding: 22px 26px; margin: 0 0 20px; }
figure { margin: 0; } img { display: block; max-width: 100%; height: auto; margin: 4px auto 8px; }
figcaption { color: #3b4656; border-left: 3px solid #56B4E9; padding-left: 12px; font-size: 15px; }
code { font-size: 14px; white-space: nowrap; }
ul { margin: 0; padding-left: 22px; }
.scroll { max-height: 520px; overflow: auto; margin: 8px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; width: 100%; }
th { color: #566173; font-weight: 600; white-space: nowrap; position: sticky; top: 0; background: #fff; }
th, td { padding: 5px 10px; border-bottom: 1px solid #e8ebf0; text-align: right; }
th.text, td.text { text-align: left; } td.text { overflow-wrap: anywhere; } td:first-child { min-width: 7em; }
footer { color: #566173; font-size: 14px; }
@media print { body { background: #fff; } section { break-inside: avoid; } .scroll { max-height: none; } }
"""


@dataclass
class Section:
    """A section of a page: the id of its anchor, its title and its HTML."""

    key: str
    title: str
    blocks: list[str]


def paragraph(text: str) -> str:
    """Returns a paragraph."""
    return f"<p>{_with_code(text)}</p>"


def _with_code(text: str) -> str:
    """Formats flags as code."""
    return re.sub(r"--\w+", r"<code>\g<0></code>", escape(text))


def bullet_list(lines: Sequence[str]) -> str:
    """Returns a bullet list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Returns a table. Floats have three digits, None is a dash, and text is left-aligned."""
    is_text = [bool(rows) and isinstance(value, str) for value in (rows[0] if rows else header)]

    def line(tag: str, values: Sequence) -> str:
        cells = (
            f"<{tag}{' class=text' * left}>{escape(_cell(value))}</{tag}>"
            for value, left in zip(values, is_text, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head, body = line("th", header), "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else value


def figure(image: Image.Image, caption: str, alternative: str, title: str = "", photo: bool = False) -> str:
    """Returns an embedded image with a caption.

    Args:
        image: The image.
        caption: Text below the image.
        alternative: Text for readers who cannot see the image.
        title: Heading above the image.
        photo: Store the image as JPEG, which is smaller.
    """
    buffer, format = io.BytesIO(), "jpeg" if photo else "png"
    image.save(buffer, format=format, optimize=True, quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'<figure>{heading}<img alt="{escape(alternative)}" width="{image.width}" height="{image.height}" '
        f'src="data:image/{format};base64,{data}"><figcaption>{_with_code(caption)}</figcaption></figure>'
    )


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """Returns a page with a table of contents."""
    links = " ".join(f'<a href="#{section.key}">{escape(section.title)}</a>' for section in sections)
    body = "\n".join(
        f'<section id="{section.key}"><h2>{escape(section.title)}</h2>\n' + "\n".join(section.blocks) + "\n</section>"
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n'
        f'<body><main>\n<h1>{escape(title)}</h1>\n<p class="subtitle">{escape(subtitle)}</p>\n<nav>{links}</nav>\n'
        f"{body}\n<footer>{escape(footer)}</footer>\n</main></body></html>\n"
    )
