"""nbinfer: local models from a notebook.

>>> import nbinfer as nb
>>> m = nb.load("demo")  # doctest: +SKIP
>>> nb.infer("What is the capital of France?").text  # doctest: +SKIP
'The capital of France is Paris.'
"""

from __future__ import annotations

from nbinfer._version import __version__

__all__ = ["__version__"]
