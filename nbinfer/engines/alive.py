"""Engines that are open in this process: closed before it ends, and dead in a process forked from it.

An engine's thread that still computes while the interpreter takes the libraries down ends the process with a
segmentation fault; a forked child has the engine's memory but not its thread, and would wait for ever.
"""

from __future__ import annotations

import atexit
import os
import weakref
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Closable(Protocol):
    """Something that holds memory until it is closed."""

    def close(self) -> None:
        """Free it."""
        ...


class OpenEngine(Closable, Protocol):
    """An open engine."""

    def abandon(self) -> None:
        """Never use its thread, its locks or its memory again: this is a forked child."""
        ...


@contextmanager
def closed_on_error(part: Closable) -> Iterator[None]:
    """Close ``part`` when what follows fails, or is interrupted."""
    try:
        yield
    except BaseException:
        part.close()
        raise


_open: weakref.WeakSet[OpenEngine] = weakref.WeakSet()


def register(engine: OpenEngine) -> None:
    """Remember an engine until it is gone."""
    _watch()
    _open.add(engine)


@cache
def _watch() -> None:
    atexit.register(_close_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_abandon_all)


def _close_all() -> None:
    for engine in list(_open):
        engine.close()


def _abandon_all() -> None:
    for engine in list(_open):
        engine.abandon()
    _open.clear()
