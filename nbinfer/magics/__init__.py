"""The cell magics: ``%nbinfer``, ``%infer`` and ``%%infer``.

One table of options (:mod:`nbinfer.magics.options`) drives the parser, the help, the docstrings, the
completion and the test that each option has its keyword in :func:`nbinfer.infer`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load_ipython_extension", "unload_ipython_extension"]


def load_ipython_extension(shell: Any) -> None:
    """Add the magics to ``shell``: what ``%load_ext nbinfer`` calls. Prints nothing."""
    from nbinfer.magics.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Take out everything that loading put in. Models stay loaded."""
    from nbinfer.magics.extension import unload

    unload(shell)
