"""How the site is built: ``make docs``. Warnings are errors, and so is a tutorial that fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nbinfer._version import __version__

_HERE = Path(__file__).parent

# MyST-NB reads notebooks below this folder only; the tutorials live where people look for them.
_TUTORIALS = _HERE / "tutorials"
shutil.rmtree(_TUTORIALS, ignore_errors=True)  # one that was renamed leaves nothing
_TUTORIALS.mkdir()
for _notebook in (_HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(_notebook, _TUTORIALS)

project = "nbinfer"
author = "the nbinfer developers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
highlight_language = "text"  # what a page does not call Python
pygments_dark_style = "monokai"
html_theme = "furo"
html_title = f"nbinfer {release}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# An unchanged tutorial is not run again. NBINFER_DOCS_EXECUTE=off builds without running any.
nb_execution_mode = os.environ.get("NBINFER_DOCS_EXECUTE", "cache")
# These need torch, which is not where the site is built: they show what was saved with them.
nb_execution_excludepatterns = ["07-*.ipynb", "10-*.ipynb"]
nb_execution_raise_on_error = True
nb_execution_timeout = 170

# A cell of %%infer holds a prompt, which is no Python.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what a parameter means; the signature has its type
autoclass_content = "class"
napoleon_google_docstring = False
napoleon_use_rtype = False
