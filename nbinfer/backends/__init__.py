"""The backends: which there are, whether they can be used here, and how they load a model."""

from __future__ import annotations

from nbinfer.backends.protocol import Backend, Updatable
from nbinfer.backends.registry import backends, check_name, for_format, get, refresh, statuses

__all__ = ["Backend", "Updatable", "backends", "check_name", "for_format", "get", "refresh", "statuses"]
