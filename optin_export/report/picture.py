"""Draw the network: every block in the order of the data flow, with kept and removed units.

SVG is written directly, not by matplotlib, because units need tooltips and colours that follow the page's theme.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from optin_export.report.plots import short
from optin_export.report.schema import GroupResult

#: Width in the drawing's own units; the page scales it.
WIDTH, LEFT, PITCH, HEIGHT, NUMBERS = 720, 74, 24, 15, 84
#: Maximum units drawn individually; above it, a mark represents several, with the share of kept ones as its opacity.
MARKS = 64


def network(
    groups: Sequence[GroupResult], kept: Mapping[tuple[int, str], Sequence[int]], merged: Sequence[int] = ()
) -> str:
    """An `<svg>`, or "" without groups.

    kept: (block, kind) -> indices of the units that stay; for a group that is missing, the first units are drawn as
    kept. merged: tokens merged in each block.
    """
    if not groups:
        return ""
    kinds, blocks = list(dict.fromkeys(one.kind for one in groups)), sorted({one.block for one in groups})
    tokens = any(merged)
    column = (WIDTH - LEFT - (NUMBERS if tokens else 0)) / len(kinds)
    largest = {kind: max(one.count for one in groups if one.kind == kind) for kind in kinds}
    rows = {block: 44 + PITCH * at for at, block in enumerate(blocks)}
    end = 44 + PITCH * len(blocks)
    parts = [_text(LEFT + column * at, 12, short(kind), "start") for at, kind in enumerate(kinds)]
    parts += [_text(WIDTH, 12, "tokens", "end")] if tokens else []
    parts.append(f'<path d="M34 34V{end + 2}m-4 -7l4 7l4 -7" fill="none" stroke="currentColor" opacity=".6"/>')
    parts += [_text(34, 28, "input", "middle"), _text(34, end + 16, "output", "middle")]
    for block, y in rows.items():
        parts.append(f'<rect x="6" y="{y}" width="56" height="{HEIGHT}" rx="3" class="block"/>')
        parts.append(_text(34, y + 11.5, f"block {block}", "middle"))
        if tokens:
            gone = merged[block] if block < len(merged) else 0
            parts.append(_text(WIDTH, y + 11.5, f"{gone} merged" if gone else "all stay", "end"))
    for one in groups:
        x = LEFT + column * kinds.index(one.kind)
        room = (column - NUMBERS) * one.count / largest[one.kind]
        stays = kept.get((one.block, one.kind), range(one.kept))
        parts.append(_group(one, stays, x, rows[one.block], room))
    label = (
        f"The network from input to output: {' and '.join(kinds)} that stay and that were removed in each of "
        f"{len(blocks)} blocks; the numbers are in the table below"
    )
    return (
        f'<svg class="plot picture" role="img" aria-label="{html.escape(label)}" viewBox="0 0 {WIDTH} {end + 22}" '
        f'font-size="10.5">{"".join(parts)}</svg>'
    )


def _group(one: GroupResult, kept: Sequence[int], x: float, y: float, room: float) -> str:
    """Units of one group from left to right in the order of their indices, and how many stay."""
    hint = f"block {one.block}, {one.kind}: {one.kept} of {one.count} stay"
    parts = [f"<g><title>{html.escape(hint)}</title>"]
    if one.kept == 0:
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{room:.1f}" height="{HEIGHT}" class="gone" stroke-dasharray="4 3"/>'
        )
    else:
        parts.append(_marks(one.count, kept, x, y, room))
    note = f"{one.kept} of {one.count}" if one.kept else "removed whole"
    parts.append(_text(x + room + 5, y + 11.5, note, "start"))
    return "".join(parts) + "</g>"


def _marks(count: int, kept: Sequence[int], x: float, y: float, room: float) -> str:
    """The frame with one path for all marks of the same shade, to keep the page small."""
    bins = min(count, MARKS)
    shares = [0.0] * bins
    sizes = [0] * bins
    stays = set(kept)
    for unit in range(count):
        at = unit * bins // count
        sizes[at] += 1
        shares[at] += unit in stays
    step = room / bins
    gap = min(1.0, 0.15 * step)
    shades: dict[int, list[str]] = {}
    for at, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        level = round(8 * share / size)
        if level or share:
            shades.setdefault(max(level, 1), []).append(
                f"M{x + at * step:.1f} {y}h{step - gap:.2f}v{HEIGHT}h-{step - gap:.2f}z"
            )
    frame = f'<rect x="{x:.1f}" y="{y}" width="{room:.1f}" height="{HEIGHT}" class="gone"/>'
    paths = (f'<path class="stays" opacity="{level / 8:g}" d="{"".join(d)}"/>' for level, d in sorted(shades.items()))
    return frame + "".join(paths)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{html.escape(text)}</text>'
