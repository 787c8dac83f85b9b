"""LoRA adapters: loaded beside the weights, switched on by name."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ModelLoadError, RequestError
from nbinfer.engines.llamacpp.library import LOG, library

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nbinfer.engines.llamacpp.weights import Weights

ALWAYS = "default"
"""Name of an adapter given without one: it is on in every request that names no other."""


class Adapters:
    """The adapters of one model. The model frees them with itself.

    Parameters
    ----------
    files
        GGUF adapter files by name.

    Raises
    ------
    ModelLoadError
        A file is no adapter, or one for another model.
    """

    def __init__(self, weights: Weights, files: Mapping[str, Path]) -> None:
        self._lib = library()
        self._pointers: dict[str, Any] = {}
        self._applied: str | None = None
        for name, path in files.items():
            since = LOG.mark()
            pointer = self._lib.llama_adapter_lora_init(weights.pointer, str(path).encode())
            if not pointer:
                reasons = LOG.errors(since)
                reason = reasons[-1][:200] if reasons else "no reason given"
                raise ModelLoadError(
                    f"cannot load the adapter {path.name}: {reason}\n"
                    f"It must be a GGUF LoRA adapter made for {weights.path.stem}.",
                )
            self._pointers[name] = pointer

    @property
    def names(self) -> tuple[str, ...]:
        """Names that a request may use."""
        return tuple(self._pointers)

    def choose(self, asked: str | None) -> str | None:
        """The adapter a request means; None is the bare model.

        Raises
        ------
        RequestError
            There is none of that name.
        """
        if asked is None:
            return ALWAYS if ALWAYS in self._pointers else None
        if asked not in self._pointers:
            known = ", ".join(self._pointers) or "none; give lora={name: file} to nb.load"
            raise RequestError(f"there is no adapter {asked!r}. Loaded: {known}.")
        return asked

    def apply(self, context: Any, name: str | None) -> None:
        """Switch a llama.cpp context to an adapter, or to none."""
        if name == self._applied:
            return
        kind = self._lib.llama_adapter_lora_p_ctypes
        if name is None:
            self._lib.llama_set_adapters_lora(context, None, 0, None)
        else:
            pointers, scales = (kind * 1)(self._pointers[name]), (ctypes.c_float * 1)(1.0)
            self._lib.llama_set_adapters_lora(context, pointers, 1, scales)
        self._applied = name
