"""Who waits, who has a place in the context, and whose turn a step is.

Cells come before rows of a batch: one slot is kept for them, rows make way when there is no room, and while
somebody waits at a cell, rows take part in some steps only.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from nbinfer.engines.llamacpp.sequence import youth

if TYPE_CHECKING:
    from nbinfer.engines.llamacpp.adapters import Adapters
    from nbinfer.engines.llamacpp.context import Context
    from nbinfer.engines.llamacpp.prefixes import Prefixes
    from nbinfer.engines.llamacpp.sequence import Sequence, Slot

CROWD = 1024
"""Plain attention, as on a CPU, looks at the cells of all sequences. Beyond so many that are not common to a
batch row and the others, another row beside them costs more than it brings."""
BATCH_TURN = 3
"""While somebody waits at a cell, batch rows take part in every third step."""


class Schedule:
    """The sequences of one context; for the thread that owns it.

    Parameters
    ----------
    slots
        The context's places; :attr:`waiting` holds the sequences that have none.
    prefixes
        What the slots hold.
    adapters
        Which adapters there are: a batch runs under one.
    """

    def __init__(self, context: Context, slots: list[Slot], prefixes: Prefixes, adapters: Adapters) -> None:
        self._context, self._slots = context, slots
        self._prefixes, self._adapters = prefixes, adapters
        self._step = 0
        self._crowd: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()

    @property
    def busy(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self.waiting) or any(s.sequence is not None for s in self._slots)

    # -- places in the context --------------------------------------------------------------------------

    def admit(self) -> None:
        """Give slots to waiting requests, cells before batch rows, as far as the context has room."""
        if any(s.slot < 0 or self._slots[s.slot].sequence is not s for s in self._crowd):
            self._crowd = []
        for sequence in sorted(self.waiting, key=lambda s: not s.interactive):
            while not self._has_room(sequence):
                # Rows make way for a cell until it fits; nobody else is let in meanwhile.
                if not (sequence.interactive and self._evict_batch_row()):
                    return
            if self._place(sequence):
                self.waiting.remove(sequence)

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a slot and cells of the context are free for one more sequence."""
        taken = [s.sequence for s in self._slots if s.sequence is not None]
        # The last slot is kept for a cell, so that one typed during a batch need not wait for a row.
        kept = not sequence.interactive and len(self._slots) > 1
        if len(self._slots) - len(taken) - kept <= 0:
            return False
        if not taken:
            return True
        if sequence.alone or self._crowd:
            return False
        shared, apart = self._prefixes.cells(taken, sequence)
        if shared + apart > self._context.size:
            return False
        return sequence.interactive or apart <= CROWD or self._context.flash_attention

    def _place(self, sequence: Sequence) -> bool:
        """Put a sequence into the best free slot; False when it should wait for a prefix being computed."""
        tokens = sequence.tokens(0, sequence.length)
        patient = sequence.scores is not None or not sequence.interactive
        if patient:
            _, shared = self._prefixes.longest(tokens, sequence.adapter)
            if self._prefixes.computing_more(tokens, shared, sequence.adapter):
                return False
        target, shared = self._prefixes.begin(tokens, sequence.adapter)
        target.sequence = sequence
        sequence.slot, sequence.position = target.index, shared
        sequence.cached = min(shared, len(sequence.prompt))
        if sequence.started is None:
            sequence.started = time.perf_counter()
        return True

    def _evict_batch_row(self) -> bool:
        """Send the youngest batch row back to the queue; its tokens are kept and computed again later."""
        rows = [s for s in self._slots if s.sequence is not None and not s.sequence.interactive]
        if not rows:
            return False
        self.preempt(max(rows, key=youth))
        return True

    def preempt(self, slot: Slot) -> None:
        """Send a sequence back to the head of the queue."""
        sequence = slot.sequence
        assert sequence is not None  # noqa: S101 - callers choose taken slots
        self._prefixes.empty(slot)
        self._crowd = []
        slot.sequence = None
        sequence.slot, sequence.position = -1, 0
        self.waiting.appendleft(sequence)

    def make_room(self) -> bool:
        """Free context cells after a decode found none; False when nothing is left to free."""
        if self._prefixes.make_room():
            return True
        taken = [s for s in self._slots if s.sequence is not None]
        if len(taken) > 1:
            self.preempt(max(taken, key=youth))
            # A beginning that is shared counts once, but those that began together each hold it. Until one of
            # the others leaves nobody joins them: the one that made way would come back at once, for ever.
            self._crowd = [s.sequence for s in taken if s.sequence is not None]
            return True
        return False

    # -- a step -----------------------------------------------------------------------------------------

    def turn(self) -> list[Sequence]:
        """Return the sequences whose turn the next step is; their adapter is then in force."""
        active = [s.sequence for s in self._slots if s.sequence is not None]
        if not active:
            return []
        self._step += 1
        if self._step % BATCH_TURN and any(s.interactive for s in active):
            active = [s for s in active if s.interactive]
        return self._one_adapter(active)

    def _one_adapter(self, active: list[Sequence]) -> list[Sequence]:
        """One batch runs under one adapter: take turns between those in use."""
        in_use = list(dict.fromkeys(s.adapter for s in active))
        adapter = in_use[self._step % len(in_use)]
        self._adapters.apply(self._context.pointer, adapter)
        return [s for s in active if s.adapter == adapter]
