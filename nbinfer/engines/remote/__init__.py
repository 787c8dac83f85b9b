"""A model behind an OpenAI-style server: in the sidecar, or any server that already runs."""

from __future__ import annotations
