"""From a reference to files: what is on this disk, what can be fetched, and what its weights' identity is."""

from __future__ import annotations

from nbinfer.models.digest import weights_digest
from nbinfer.models.resolve import ResolvedModel, peek, pull, resolve
from nbinfer.models.stores import FoundModel, discover

__all__ = ["FoundModel", "ResolvedModel", "discover", "peek", "pull", "resolve", "weights_digest"]
