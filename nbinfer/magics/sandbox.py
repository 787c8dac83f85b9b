"""Where the expressions of a prompt run: what they may touch of the objects that they are handed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which knows nothing of notebooks, with what a notebook adds.

    It keeps a pasted prompt from reaching Python itself, the shell or a module. It is no jail: the methods of
    the notebook's own objects do what they do, also where that is writing a file.
    """

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether an expression may read ``obj.attr``, which is ``value``."""
        if isinstance(obj, ModuleType | InteractiveShell):
            return False  # os.system, get_ipython().system, and what every module has imported itself
        if isinstance(obj, type) and issubclass(obj, str) and attr in ("format", "format_map"):
            return False  # Jinja guards the templates of "…".format, but not those of str.format("…")
        if attr in ("eval", "query") and str(getattr(value, "__module__", "")).startswith("pandas."):
            return False  # their "@name" finds any variable of any function that is running
        return super().is_safe_attribute(obj, attr, value)
