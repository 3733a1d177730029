"""What a merge was made from, as a drawing."""

from __future__ import annotations

import html

from mats_hub.browsing import Lineage

WIDTH, HEIGHT, GAP_X, GAP_Y = 250, 46, 36, 22
LEAST_WIDTH = 760
"""A wide graph is made smaller to fit, but not below this: then it scrolls."""


def lineage_svg(root: Lineage) -> str:
    """Return a lineage as SVG, newest on top and each model once for each use; every name is text."""
    boxes: list[str] = []
    lines: list[str] = []
    columns, depth = _place(root, 0, 0, boxes, lines)
    width, height = columns * (WIDTH + GAP_X), (depth + 1) * (HEIGHT + GAP_Y) + 8
    style = f"width: 100%; max-width: {width}px; min-width: {min(width, LEAST_WIDTH)}px; height: auto"
    return (
        f"<div class='scroll' tabindex='0'><svg role='img' aria-label='Lineage of {html.escape(root.spec, True)}' "
        f"viewBox='0 0 {width} {height}' style='{style}' font-size='12'>{''.join(lines + boxes)}</svg></div>"
    )


def _place(one: Lineage, column: int, row: int, boxes: list[str], lines: list[str]) -> tuple[int, int]:
    """Draw a model and what it was made from; return how many columns that takes and how many rows down it goes."""
    taken, deepest = 0, row
    middles = []
    for parent in one.parents:
        width, low = _place(parent, column + taken, row + 1, boxes, lines)
        middles.append(_middle(column + taken, width))
        taken, deepest = taken + width, max(deepest, low)
    taken = max(taken, 1)
    middle, top = _middle(column, taken), row * (HEIGHT + GAP_Y) + 4
    for below in middles:
        lines.append(
            f"<path d='M{middle} {top + HEIGHT} C{middle} {top + HEIGHT + GAP_Y}, {below} {top + HEIGHT}, "
            f"{below} {top + HEIGHT + GAP_Y}' fill='none' stroke='var(--body-text-color-subdued)'/>"
        )
    name, _, revision = one.spec.partition("@")
    about = " · ".join(part for part in (one.role, one.method, one.note, revision[:8]) if part)
    boxes.append(
        f"<g><title>{html.escape(str(one).splitlines()[0])}</title><rect x='{middle - WIDTH / 2}' y='{top}' width='{WIDTH}' "
        f"height='{HEIGHT}' rx='8' fill='var(--block-background-fill)' stroke='var(--border-color-primary)'/>"
        f"<text x='{middle}' y='{top + 19}' text-anchor='middle' fill='var(--body-text-color)'>{_cut(name, 36)}</text>"
        f"<text x='{middle}' y='{top + 36}' text-anchor='middle' font-size='11' fill='var(--body-text-color-subdued)'>"
        f"{_cut(about, 42)}</text></g>"
    )
    return taken, deepest


def _middle(column: int, width: int) -> float:
    return (column + width / 2) * (WIDTH + GAP_X)


def _cut(text: str, length: int) -> str:
    return html.escape(text if len(text) <= length else text[: length - 1] + "…")
