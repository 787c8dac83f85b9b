"""The accessibility checker axe-core, from the package that brings it: nothing is fetched."""

from __future__ import annotations

from typing import Any

_RUN = """async ([include, exclude]) => {
  const found = await axe.run({ include, exclude });
  return found.violations.map(v => `${v.id}: ${v.help}: ${v.nodes.map(n => n.html).join(' | ')}`);
}"""


def violations(page: Any, where: str, *, but: str = "") -> list[str]:
    """Return what axe finds wrong with parts of a page, one line for each rule.

    ``where`` and ``but`` are selectors: of what is looked at, and of what inside it is left out.
    """
    from axe_playwright_python.base import AXE_SCRIPT

    page.evaluate(AXE_SCRIPT + "; undefined")
    found: list[str] = page.evaluate(_RUN, [[where], [but] if but else []])
    return found
