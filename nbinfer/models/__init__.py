"""From a reference to files: what is on this disk, what can be fetched, and what its weights' identity is."""

from __future__ import annotations

from nbinfer.models.digest import weights_digest
from nbinfer.models.resolve import ResolvedModel, resolve

__all__ = ["ResolvedModel", "resolve", "weights_digest"]
