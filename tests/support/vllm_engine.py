"""vLLM in this process, on the chat demo and at one thread; and quiet for what it is compared with."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbinfer.contract.modes import Mode
from nbinfer.models import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nbinfer.engines.vllm.generate import CompletionEngine
    from nbinfer.engines.vllm.pooled import PooledEngine

SETTINGS: dict[str, Any] = {"dtype": "float32", "threads": 1}
"""float32, because references are; one thread, because tests share the machine."""


def demo_hf() -> Path:
    """Return the folder of the chat demo."""
    return resolve("demo-hf").path


def open_demo_hf(**options: Any) -> CompletionEngine:
    """Open the chat demo; the caller closes it."""
    from nbinfer.engines.vllm.generate import CompletionEngine
    from nbinfer.engines.vllm.kernel import open_engine

    options = {"context_size": 1024, **SETTINGS, **options}
    engine = open_engine(demo_hf(), mode=Mode.COMPLETION, name="demo-hf", **options)
    assert isinstance(engine, CompletionEngine)
    return engine


def open_pooled(folder: Path, mode: Mode, **options: Any) -> PooledEngine:
    """Open a model of vectors or scores; the caller closes it."""
    from nbinfer.engines.vllm.kernel import open_engine
    from nbinfer.engines.vllm.pooled import PooledEngine

    engine = open_engine(folder, mode=mode, name=folder.name, **{**SETTINGS, **options})
    assert isinstance(engine, PooledEngine)
    return engine


@contextmanager
def quietly() -> Iterator[None]:
    """Let transformers and torch warn: that is not what a test is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
