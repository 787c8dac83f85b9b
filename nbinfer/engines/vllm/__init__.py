"""vLLM: models of safetensors, in this process or behind its own server."""

from __future__ import annotations
