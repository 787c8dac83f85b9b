"""nbinfer: local models from a notebook.

>>> import nbinfer as nb
>>> m = nb.load("demo")  # doctest: +SKIP
>>> nb.infer("What is the capital of France?").text  # doctest: +SKIP
'The capital of France is Paris.'

Names are imported when they are first used, so that ``import nbinfer`` loads no engine, no frame library and
no widget.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nbinfer._version import __version__
from nbinfer.contract import rendering

if TYPE_CHECKING:
    from nbinfer.bench import bench
    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.results import Result
    from nbinfer.display.images import gallery
    from nbinfer.frames import (
        cache,
        classify,
        complete,
        embed,
        enable_accessor,
        extract,
        filter,  # noqa: A004 - the operator's common name; it shadows nothing but in here
        generate_images,
        jinja,
        join,
        last_run,
        release,
        rerank,
        save_images,
        similar,
        submit,
        vectors,
    )
    from nbinfer.magics import load_ipython_extension, unload_ipython_extension
    from nbinfer.memory import estimate
    from nbinfer.plots import plot_bench, plot_similarity, plot_sweep
    from nbinfer.session import (
        Chat,
        Model,
        ainfer,
        dry_run,
        generate_image,
        get,
        history,
        infer,
        load,
        loaded,
        models,
        ps,
        pull,
        settings,
        status,
        stream,
        unload,
    )
    from nbinfer.widgets import memory_bar, monitor, panel, status_badge

_NAMES = {
    **dict.fromkeys(
        (
            "Chat",
            "Model",
            "ainfer",
            "dry_run",
            "generate_image",
            "get",
            "history",
            "infer",
            "load",
            "loaded",
            "models",
            "ps",
            "pull",
            "settings",
            "status",
            "stream",
            "unload",
        ),
        "nbinfer.session",
    ),
    **dict.fromkeys(
        (
            "classify",
            "complete",
            "embed",
            "extract",
            "filter",
            "generate_images",
            "last_run",
            "release",
            "rerank",
            "save_images",
            "similar",
            "submit",
            "vectors",
            "cache",
            "enable_accessor",
            "jinja",
            "join",
        ),
        "nbinfer.frames",
    ),
    **dict.fromkeys(("memory_bar", "monitor", "panel", "status_badge"), "nbinfer.widgets"),
    **dict.fromkeys(("plot_bench", "plot_similarity", "plot_sweep"), "nbinfer.plots"),
    "bench": "nbinfer.bench",
    "gallery": "nbinfer.display.images",
    "estimate": "nbinfer.memory",
    "Result": "nbinfer.contract.results",
    "NbinferError": "nbinfer.contract.errors",
    "load_ipython_extension": "nbinfer.magics",
    "unload_ipython_extension": "nbinfer.magics",
}

__all__ = [
    "Chat",
    "Model",
    "NbinferError",
    "Result",
    "__version__",
    "ainfer",
    "bench",
    "cache",
    "classify",
    "complete",
    "dry_run",
    "embed",
    "enable_accessor",
    "estimate",
    "extract",
    "filter",
    "gallery",
    "generate_image",
    "generate_images",
    "get",
    "history",
    "infer",
    "jinja",
    "join",
    "last_run",
    "load",
    "load_ipython_extension",
    "loaded",
    "memory_bar",
    "models",
    "monitor",
    "panel",
    "plot_bench",
    "plot_similarity",
    "plot_sweep",
    "ps",
    "pull",
    "release",
    "rerank",
    "save_images",
    "settings",
    "similar",
    "status",
    "status_badge",
    "stream",
    "submit",
    "unload",
    "unload_ipython_extension",
    "vectors",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'nbinfer' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


def _render(value: Any) -> rendering.Bundle:
    bundle: rendering.Bundle = import_module("nbinfer.display").mimebundle(value)
    return bundle


rendering.register(_render)


def _always(name: str, room: str) -> property:
    """A name of this package that means a function, though a module has it too."""

    def get(_package: ModuleType) -> Any:
        return getattr(import_module(room), name)

    def ignore(_package: ModuleType, _module: ModuleType) -> None:
        pass

    return property(get, ignore)


class _Package(ModuleType):
    """The package, in which ``models`` and ``bench`` are always the functions.

    Modules have these names too; they are imported as ``from nbinfer.models import …``.
    """

    models = _always("models", "nbinfer.session")
    bench = _always("bench", "nbinfer.bench")

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Travel by name: a function of a notebook that says ``nb.`` is sent to other processes with it."""
        return import_module, (__name__,)


sys.modules[__name__].__class__ = _Package
