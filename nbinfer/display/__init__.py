"""How values look: safe HTML and plain text in a notebook, plain text in a terminal.

Whatever a model, a hub or a file name wrote is data here. It is rendered to HTML in this process, escaped,
and never handed to a front end as Markdown: in a cell that was just run, Markdown output may run scripts.
"""

from __future__ import annotations

from nbinfer.display.bundles import mimebundle

__all__ = ["mimebundle"]
