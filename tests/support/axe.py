"""The accessibility checker axe-core, from the package that brings it: nothing is fetched."""

from __future__ import annotations

from typing import Any

_RUN = """async where => {
  const found = await axe.run(where);
  return found.violations.map(v => `${v.id}: ${v.help}: ${v.nodes.map(n => n.html).join(' | ')}`);
}"""


def violations(page: Any, where: str) -> list[str]:
    """Return what axe finds wrong with the parts of a page that a selector names, one line for each rule."""
    from axe_playwright_python.base import AXE_SCRIPT

    page.evaluate(AXE_SCRIPT + "; undefined")
    found: list[str] = page.evaluate(_RUN, where)
    return found
