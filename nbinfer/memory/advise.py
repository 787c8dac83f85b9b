"""The nearest settings that fit: searched by formula, confirmed by llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NbinferError
from nbinfer.memory.shown import VERDICTS, Advice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nbinfer.memory.estimate import Estimate

_STEP = 256
_LEAST_CONTEXT = 512
_SMALL_CACHE = "q8_0"


def advise(asked: Estimate) -> tuple[Advice, ...]:
    """Return the changes that make it fit, the least painful first; where nothing does, what is tight.

    A smaller context; a smaller cache with as much context as then fits; fewer layers on the GPU; a
    mixture's experts in main memory.
    """
    for worst in ("fits", "tight"):
        search = _Search(asked, VERDICTS.index(worst))
        found = tuple(advice for advice in search.candidates() if search.holds(advice.changes))
        if found:
            return found if worst == "fits" else tuple(Advice(f"{a.text} (tight)", a.changes) for a in found)
    return ()


@dataclass(frozen=True, slots=True)
class _Search:
    """One search: what is asked for, and the worst verdict that will do."""

    asked: Estimate
    worst: int

    def candidates(self) -> Iterator[Advice]:
        """Return what fits by formula."""
        asked = self.asked
        size = asked.context_size
        smaller = self._largest_context({})
        if smaller is not None:
            yield Advice(f"context {_short(size)} -> {_short(smaller)}", {"context_size": smaller})
        if asked.settings.kv_type in ("f16", "bf16", "f32"):
            changes: dict[str, Any] = {"kv_type": _SMALL_CACHE}
            if self._fits(changes):
                yield Advice(f"KV cache {_SMALL_CACHE}", changes)
            elif (fitting := self._largest_context(changes)) is not None and fitting > (smaller or 0):
                yield Advice(
                    f"KV cache {_SMALL_CACHE} at {_short(fitting)}", {**changes, "context_size": fitting}
                )
        if asked.gpus:
            yield from self._off_the_gpu()

    def _off_the_gpu(self) -> Iterator[Advice]:
        """Move layers, or experts, to main memory."""
        header = self.asked.header
        if header.get("expert_count", 0) and not self.asked.settings.experts_on_cpu:
            changes: dict[str, Any] = {"experts_on_cpu": True}
            if self._fits(changes):
                yield Advice("experts in main memory", changes)
        every = (header.n_layers or 0) + 1
        layers = _largest(0, every - 1, lambda n: self._fits({"gpu_layers": n}))
        if layers is not None:
            yield Advice(f"{layers} of {every} layers on the GPU", {"gpu_layers": layers})

    def _largest_context(self, changes: dict[str, Any]) -> int | None:
        """The largest context below the one asked for that fits, in steps of the cache."""
        steps = _largest(
            _LEAST_CONTEXT // _STEP,
            (self.asked.context_size - 1) // _STEP,
            lambda n: self._fits({**changes, "context_size": n * _STEP}),
        )
        return None if steps is None else steps * _STEP

    def _fits(self, changes: dict[str, Any]) -> bool:
        return self.holds({**changes, "exact": False})

    def holds(self, changes: Mapping[str, Any]) -> bool:
        """Whether the verdict is good enough with these options."""
        try:
            return VERDICTS.index(self.asked.again(**changes).verdict) <= self.worst
        except NbinferError:
            return False


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


def _short(tokens: int) -> str:
    """Tokens as people say them: 4k, 12.5k, 768."""
    if tokens < 1024:  # noqa: PLR2004 - one k
        return str(tokens)
    thousands = tokens / 1024
    return f"{thousands:.3g}k" if thousands < 999.5 else f"{thousands:,.0f}k"  # noqa: PLR2004 - no exponent
