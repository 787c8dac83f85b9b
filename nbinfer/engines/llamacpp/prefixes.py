"""Beginnings that prompts share: what the context's slots hold, and how much of it a new prompt may take.

A finished sequence stays in its slot until the slot is needed, and a new prompt starts from the longest
beginning that any slot, or the store of saved states, holds. What kind of memory a model has decides what can
be taken:

- keys and values of every token (most models): any beginning;
- a sliding window: a beginning whose last window is still there;
- one state for all of the past (recurrent and hybrid models): all that is held, or nothing.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from nbinfer.engines.llamacpp.sequence import common_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from nbinfer.engines.llamacpp.context import Context
    from nbinfer.engines.llamacpp.saved import SavedStates
    from nbinfer.engines.llamacpp.sequence import Sequence, Slot
    from nbinfer.engines.llamacpp.weights import Weights

MIN_SHARED = 8
"""Shorter common beginnings are not worth waiting for."""
MIN_SAVED = 32
"""Fewer tokens are computed again as fast as their state is copied."""


class Prefixes:
    """The slots of one context, and what they hold.

    Parameters
    ----------
    shares
        False: nothing is ever shared (``exact=True``).
    saved
        A store for what slots have to give up; None is none.
    """

    def __init__(
        self,
        context: Context,
        weights: Weights,
        slots: list[Slot],
        *,
        shares: bool,
        saved: SavedStates | None,
    ) -> None:
        self._context = context
        self._slots = slots
        self._shares = shares
        self._folds = weights.has_recurrent_state
        self._window = weights.window
        self._saved = saved if shares else None
        self._newest_row: Slot | None = None

    @property
    def parts(self) -> bool:
        """Whether sequences can share a part of what they hold."""
        return self._shares and not self._folds

    # -- a new prompt ------------------------------------------------------------------------------------

    def longest(self, tokens: NDArray[np.int32], adapter: str | None) -> tuple[Slot | None, int]:
        """The slot that holds the longest usable beginning of ``tokens``, and its length."""
        source, shared = None, 0
        if self._shares:
            for slot in (s for s in self._slots if s.adapter == adapter):
                # At least one token is left to decode, for its logits.
                n = min(common_prefix(slot.held, tokens), len(tokens) - 1)
                if n > shared and self._usable(slot, n):
                    source, shared = slot, n
        return source, shared

    def _usable(self, slot: Slot, n: int) -> bool:
        """Whether the first ``n`` tokens that a slot holds can be taken from it exactly."""
        if self._folds:
            return n == len(slot.held) and slot.sequence is None
        if self._window:
            # The next token looks back at itself and window - 1 before it; -1: nothing of it is left.
            return 0 <= self._context.first_position(slot.index) <= max(0, n - self._window + 1)
        return True

    def computing_more(self, tokens: NDArray[np.int32], shared: int, adapter: str | None) -> bool:
        """Whether a prompt being computed will soon share clearly more than ``shared`` tokens."""
        if not self.parts:
            return False
        coming = (
            min(common_prefix(s.sequence.prompt, tokens), len(tokens) - 1)
            for s in self._slots
            if s.sequence is not None and not s.sequence.generated and s.adapter == adapter
        )
        return max(coming, default=0) >= max(shared, MIN_SHARED) + MIN_SHARED

    def cells(self, running: list[Sequence], sequence: Sequence) -> tuple[int, int]:
        """Cells of the context when ``sequence`` runs beside others: those it shares, and all the rest."""
        tokens = sequence.tokens(0, sequence.length)
        common = [common_prefix(s.prompt, tokens) if self.parts else 0 for s in running]
        shared = max(common, default=0)
        others = sum(s.cells - n for s, n in zip(running, common, strict=True))
        return shared, others + sequence.cells + 1 - shared

    def begin(self, tokens: NDArray[np.int32], adapter: str | None) -> tuple[Slot, int]:
        """Choose a free slot for a prompt and put the longest known beginning into it.

        Returns the slot and the length of that beginning.
        """
        source, shared = self.longest(tokens, adapter)
        free = [s for s in self._slots if s.sequence is None]
        takes_over = source is not None and source.sequence is None
        if source is not None and takes_over and (shared >= len(source.held) // 2 or free == [source]):
            target = source
            self._give_up(target, shared)
        else:
            # Prefer a slot that holds nothing, then the one unused for longest.
            target = min((s for s in free if s is not source), key=lambda s: (len(s.held) > 0, s.released))
            self._give_up(target, 0)
            if source is not None:
                self._context.copy(source.index, target.index, shared)
        target.held, target.adapter, target.row = tokens[:shared], adapter, False
        return target, self._restored(target, tokens, shared)

    def _restored(self, slot: Slot, tokens: NDArray[np.int32], shared: int) -> int:
        """Put a saved state into a slot where one holds clearly more than the slot does already."""
        if self._saved is None:
            return shared
        found = self._saved.longest(tokens, slot.adapter, more_than=shared + MIN_SAVED, whole=self._folds)
        if found is None:
            return shared
        state, held = found
        if not self._context.restore(slot.index, state):
            self.empty(slot)
            return 0
        slot.held = held
        n = min(common_prefix(held, tokens), len(tokens) - 1)
        if not self._usable(slot, n):
            self.empty(slot)
            return 0
        self._context.drop(slot.index, n)
        slot.held = tokens[:n]
        return n

    # -- what is held ------------------------------------------------------------------------------------

    def holds(self, slot: Slot, tokens: NDArray[np.int32]) -> None:
        """Note the tokens whose memory a slot has now."""
        if self._shares:
            slot.held = tokens

    def finished(self, slot: Slot, sequence: Sequence, waiting: Iterable[Sequence]) -> None:
        """Keep what a finished sequence leaves in its slot."""
        if not self._shares:
            self.empty(slot)
            return
        slot.held = sequence.tokens(0, sequence.position).copy()
        slot.row = not sequence.interactive
        if not slot.row or self._folds or self._context.flash_attention:
            return
        # The newest row stays whole, for those that come after it.
        before, self._newest_row = self._newest_row, slot
        if before is not None and before is not slot and before.sequence is None and before.row:
            self._trim(before, waiting)

    def _trim(self, slot: Slot, waiting: Iterable[Sequence]) -> None:
        """Of a finished batch row, keep what others have in common with it.

        Plain attention looks at every cell that is in use, also at those that nobody needs any more.
        """
        others = [s.held for s in self._slots if s is not slot and len(s.held)]
        others += [s.prompt for s in itertools.islice(waiting, 4 * len(self._slots))]
        if others:
            keep = max(common_prefix(slot.held, tokens) for tokens in others)
            if not self._usable(slot, keep):
                keep = 0
            self._context.drop(slot.index, keep)
            slot.held = slot.held[:keep]

    def empty(self, slot: Slot) -> None:
        """Forget what a slot holds."""
        self._context.drop(slot.index)
        slot.held = np.empty(0, np.int32)

    def take_back(self, slot: Slot, sequence: Sequence) -> None:
        """Forget what a decode that was broken off may have stored."""
        if not self._context.drop(slot.index, sequence.position):
            # A folded state cannot be cut: it is computed again.
            self.empty(slot)
            sequence.position = 0

    def make_room(self) -> bool:
        """Give up what idle slots hold; False when they hold nothing."""
        idle = [s for s in self._slots if s.sequence is None and len(s.held)]
        for slot in idle:
            self._give_up(slot, 0)
            slot.held = np.empty(0, np.int32)
        return bool(idle)

    def save(self) -> None:
        """Save what idle slots hold, before the context ends, where that outlives it."""
        if self._saved is not None and self._saved.persistent:
            for slot in self._slots:
                if slot.sequence is None:
                    self._save(slot, 0)

    def _give_up(self, slot: Slot, keep: int) -> None:
        self._save(slot, keep)
        self._context.drop(slot.index, keep)

    def _save(self, slot: Slot, keep: int) -> None:
        """Save a chat's state, unless a slot or the store has it already; rows of a batch never come back."""
        if self._saved is None or slot.row or len(slot.held) - keep < MIN_SAVED:
            return
        if not self._saved.has(slot.held, slot.adapter):
            self._saved.put(slot.held, slot.adapter, self._context.state(slot.index))
