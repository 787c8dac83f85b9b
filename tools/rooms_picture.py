"""Draw the rooms of the package, from the list that the import check reads.

python tools/rooms_picture.py        # rewrites docs/images/rooms.svg

The picture stands inside the page, so that it has the page's colours in light and in dark.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

BANDS = (
    ("what a person touches", ("magics", "widgets", "plots", "display", "cli")),
    ("what is asked", ("frames", "bench", "session", "tables", "request_log")),
    ("who answers", ("sidecar", "backends", "engines")),
    ("what is known beforehand", ("memory", "models", "gguf", "processor")),
    ("the words they share", ("contract",)),
)
_WIDTH, _LEFT, _HEIGHT, _GAP = 740, 186, 46, 26
_STYLE = """
.rooms text{font:14px system-ui,sans-serif;fill:var(--color-foreground-primary,currentColor)}
.rooms .band{font-size:13px;fill:var(--color-foreground-secondary,currentColor)}
.rooms rect{fill:var(--color-background-secondary,none);stroke:var(--color-foreground-border,currentColor)}
.rooms path{stroke:var(--color-foreground-secondary,currentColor);fill:none;stroke-width:1.5}
.rooms .room{font:13px ui-monospace,monospace}
""".strip()


def layers() -> list[str]:
    """Return the rooms from top to bottom, as ``pyproject.toml`` has them."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return [
        part.strip().removeprefix("nbinfer.")
        for layer in contracts[0]["layers"]
        for part in layer.replace(":", "|").split("|")
    ]


def picture() -> str:
    """Return the picture; a room that no band has is in none.

    Raises
    ------
    SystemExit
        The rooms are not those of ``pyproject.toml``.
    """
    rooms = layers()
    bands = [(words, [room for room in names if room in rooms]) for words, names in BANDS]
    missing = set(rooms) - {room for _, names in bands for room in names}
    if missing:
        raise SystemExit(f"tools/rooms_picture.py: no band for {', '.join(sorted(missing))}")
    height = len(bands) * (_HEIGHT + _GAP) - _GAP + 8
    parts = [
        f'<svg class="rooms" viewBox="0 0 {_WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg" '
        f'style="max-width:{_WIDTH}px;width:100%">',
        "<title>The rooms of nbinfer, from what a person touches down to the words they share</title>",
        f"<style>{_STYLE}</style>",
    ]
    for i, (words, names) in enumerate(bands):
        top = 4 + i * (_HEIGHT + _GAP)
        middle = top + _HEIGHT / 2 + 5
        parts.append(f'<text class="band" x="0" y="{middle:g}">{words}</text>')
        width = (_WIDTH - _LEFT - 8 * (len(names) - 1)) / len(names)
        for j, name in enumerate(names):
            x = _LEFT + j * (width + 8)
            centre = x + width / 2
            parts.append(
                f'<rect x="{x:.1f}" y="{top}" width="{width - 1:.1f}" height="{_HEIGHT}" rx="5"/>'
                f'<text class="room" x="{centre:.1f}" y="{middle:g}" text-anchor="middle">{name}</text>'
            )
        if i < len(bands) - 1:
            x, start, end = (_LEFT + _WIDTH) / 2, top + _HEIGHT + 4, top + _HEIGHT + _GAP - 5
            parts.append(f'<path d="M{x} {start}V{end}m-5 -6l5 6l5 -6"/>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture())
