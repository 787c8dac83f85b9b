"""The nearest settings that fit: searched by formula, confirmed by llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NbinferError
from nbinfer.memory.estimate import Advice, Estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_STEP = 256
_LEAST_CONTEXT = 512
_SMALL_CACHE = "q8_0"


def advise(asked: Estimate) -> tuple[Advice, ...]:
    """Return the changes that make it fit, the least painful first.

    A smaller context; a smaller cache with as much context as then fits; fewer layers on the GPU; a
    mixture's experts in main memory.
    """
    found = [advice for advice in _candidates(asked) if _confirmed(asked, advice)]
    return tuple(found)


def _candidates(asked: Estimate) -> Iterator[Advice]:
    size = asked.context_size
    smaller = _largest_context(asked, {})
    if smaller is not None:
        yield Advice(f"context {_short(size)} -> {_short(smaller)}", {"context_size": smaller})
    if asked.settings.kv_type in ("f16", "bf16", "f32"):
        changes: dict[str, Any] = {"kv_type": _SMALL_CACHE}
        if _fits(asked, changes):
            yield Advice(f"KV cache {_SMALL_CACHE}", changes)
        elif (fitting := _largest_context(asked, changes)) is not None and fitting > (smaller or 0):
            yield Advice(
                f"KV cache {_SMALL_CACHE} at {_short(fitting)}", {**changes, "context_size": fitting}
            )
    if asked.gpus:
        yield from _off_the_gpu(asked)


def _off_the_gpu(asked: Estimate) -> Iterator[Advice]:
    """Move layers, or experts, to main memory."""
    if asked.header.get("expert_count", 0) and not asked.settings.experts_on_cpu:
        changes: dict[str, Any] = {"experts_on_cpu": True}
        if _fits(asked, changes):
            yield Advice("experts in main memory", changes)
    every = (asked.header.n_layers or 0) + 1
    layers = _largest(0, every - 1, lambda n: _fits(asked, {"gpu_layers": n}))
    if layers is not None:
        yield Advice(f"{layers} of {every} layers on the GPU", {"gpu_layers": layers})


def _largest_context(asked: Estimate, changes: dict[str, Any]) -> int | None:
    """The largest context below the one asked for that fits, in steps of the cache."""
    steps = _largest(
        _LEAST_CONTEXT // _STEP,
        (asked.context_size - 1) // _STEP,
        lambda n: _fits(asked, {**changes, "context_size": n * _STEP}),
    )
    return None if steps is None else steps * _STEP


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number for which ``fits`` holds, when it holds up to some number and not beyond."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _fits(asked: Estimate, changes: dict[str, Any]) -> bool:
    try:
        return asked.again(**changes, exact=False).verdict != "does not fit"
    except NbinferError:
        return False


def _confirmed(asked: Estimate, advice: Advice) -> bool:
    try:
        return asked.again(**advice.changes).verdict != "does not fit"
    except NbinferError:
        return False


def _short(tokens: int) -> str:
    """Tokens as people say them: 4k, 12.5k, 768."""
    return f"{tokens / 1024:.3g}k" if tokens >= 1024 else str(tokens)  # noqa: PLR2004 - one k
