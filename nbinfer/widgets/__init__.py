"""Widgets: a headless state, a live view of it, and a still picture for where widgets cannot run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbinfer.session import Model
    from nbinfer.widgets.watched import Watched

__all__ = ["memory_bar", "monitor", "panel", "status_badge"]


def panel(ref: str | None = None) -> Any:
    """Return the panel: models on this disk and in memory, what fits, what runs, and the backends.

    Parameters
    ----------
    ref
        A model to begin with, as for :func:`nbinfer.load`: what it takes is shown, and it can be loaded.

    Returns
    -------
    widget
        A live one, to be shown by a cell; a still picture of the same where anywidget is not installed. It
        looks at the machine once a second while it is on a page, and not otherwise; ``close()`` ends it.
        Closing unloads nothing.

    Raises
    ------
    NbinferError
        There is no model ``ref``, or it cannot be read.
    """
    from nbinfer.widgets.controller import Controller
    from nbinfer.widgets.planner import MemoryPlanner

    controller = Controller(MemoryPlanner())
    if ref is not None:
        controller.plan(ref, {})
    controller.look()
    controller.look_around()
    return show("panel", controller)


def memory_bar(ref: str, **settings: Any) -> Any:
    """Return what memory a model takes, with sliders for what changes it.

    Parameters
    ----------
    ref
        A model, as for :func:`nbinfer.load`.
    settings
        To start with: ``context_size``, ``kv_type``, ``gpu_layers``, ``parallel``.

    Raises
    ------
    NbinferError
        There is no such model, or its memory cannot be told.
    """
    from nbinfer.widgets.controller import Controller
    from nbinfer.widgets.planner import MemoryPlanner

    controller = Controller(MemoryPlanner())
    controller.plan(ref, settings)
    return show("bar", controller)


def status_badge(model: Model | str) -> Any:
    """Return a small badge that says what a model, or a backend, is doing.

    Parameters
    ----------
    model
        A loaded model or its name, or the name of a backend.

    Raises
    ------
    ModelNotFound
        Neither a loaded model nor a backend is called that.
    """
    from nbinfer.widgets.badge import watch

    return show("badge", watch(model))


def monitor() -> Any:
    """Return bars of main memory and of each GPU's, drawn once a second while they are on a page."""
    from nbinfer.widgets.planner import MemoryPlanner
    from nbinfer.widgets.state import EMPTY
    from nbinfer.widgets.watched import Watched

    planner = MemoryPlanner()
    watched = Watched({"machine": EMPTY["machine"]}, lambda: {"machine": planner.machine()})
    watched.look()
    return show("monitor", watched)


def show(kind: str, watched: Watched) -> Any:
    """Return a widget of a state: a live one, or a still picture where anywidget is not installed.

    Parameters
    ----------
    kind
        ``panel``, ``bar``, ``badge`` or ``monitor``.
    watched
        Its state, and what its buttons do.
    """
    try:
        from nbinfer.widgets.view import View
    except ImportError:
        from nbinfer.widgets.still import Still

        return Still(kind, watched)
    return View(kind, watched)
