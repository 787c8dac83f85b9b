"""The accessibility checker axe-core, where it is installed: ``npm install axe-core``, or NBINFER_AXE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

_RUN = """async where => {
  const found = await axe.run(where);
  return found.violations.map(v => `${v.id}: ${v.help}: ${v.nodes.map(n => n.html).join(' | ')}`);
}"""


def axe() -> Path:
    """Return its file; skips the test where there is none."""
    named = os.environ.get("NBINFER_AXE")
    path = Path(named) if named else Path(__file__).parents[2] / "node_modules/axe-core/axe.min.js"
    if not path.is_file():
        pytest.skip(f"no accessibility check: there is no {path}; npm install axe-core, or set NBINFER_AXE")
    return path


def violations(page: Any, where: str) -> list[str]:
    """Return what axe finds wrong with the part of a page that a selector names."""
    page.evaluate(axe().read_text() + "; undefined")
    found: list[str] = page.evaluate(_RUN, where)
    return found
