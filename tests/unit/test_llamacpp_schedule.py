"""Who runs, who waits and whose turn it is: cells before rows, one adapter at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nbinfer.contract.requests import CompletionRequest
from nbinfer.engines.llamacpp.schedule import BATCH_TURN, CROWD, Schedule
from nbinfer.engines.llamacpp.sequence import Sequence, Slot
from nbinfer.engines.stream import Stream
from nbinfer.engines.text import TextAssembler

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Prefixes:
    """Slots that share nothing: a sequence takes as many cells as it has tokens."""

    def __init__(self, slots: list[Slot]) -> None:
        self._slots = slots
        self.emptied: list[int] = []

    def cells(self, running: list[Sequence], sequence: Sequence) -> tuple[int, int]:
        return 0, sum(each.cells for each in [*running, sequence])

    def longest(self, tokens: NDArray[np.int32], adapter: str | None) -> tuple[None, int]:
        del tokens, adapter
        return None, 0

    def computing_more(self, tokens: NDArray[np.int32], shared: int, adapter: str | None) -> bool:
        del tokens, shared, adapter
        return False

    def begin(self, tokens: NDArray[np.int32], adapter: str | None) -> tuple[Slot, int]:
        del tokens, adapter
        return next(slot for slot in self._slots if slot.sequence is None), 0

    def empty(self, slot: Slot) -> None:
        self.emptied.append(slot.index)

    def make_room(self) -> bool:
        return False


class Adapters:
    def __init__(self) -> None:
        self.applied: list[str | None] = []

    def apply(self, pointer: Any, adapter: str | None) -> None:
        del pointer
        self.applied.append(adapter)


def schedule(n_slots: int, *, size: int = 4096, flash: bool = False) -> tuple[Schedule, list[Slot], Adapters]:
    slots, adapters = [Slot(i) for i in range(n_slots)], Adapters()
    context: Any = SimpleNamespace(size=size, flash_attention=flash, pointer=None)
    prefixes: Any = Prefixes(slots)
    given: Any = adapters
    return Schedule(context, slots, prefixes, given), slots, adapters


def waits(name: str, *, n: int = 10, adapter: str | None = None) -> Sequence:
    """A sequence whose name says what it is."""
    sampler: Any = None
    return Sequence(
        request=CompletionRequest(prompt=name, priority="interactive" if "cell" in name else "batch"),
        stream=Stream(),
        prompt=np.zeros(n, np.int32),
        prompt_text=name,
        sampler=sampler,
        assembler=TextAssembler(),
        seed=0,
        limit=5,
        submitted=0.0,
        adapter=adapter,
    )


def names(sequences: Any) -> list[str]:
    return [each.prompt_text for each in sequences]


def running(slots: list[Slot]) -> list[str]:
    return names(slot.sequence for slot in slots if slot.sequence is not None)


@pytest.mark.parametrize(
    ("n_slots", "flash", "sequences", "expected"),
    [
        # The last slot is a cell's.
        (3, False, [waits("row 1"), waits("row 2"), waits("row 3")], ["row 1", "row 2"]),
        (3, False, [waits("row 1"), waits("row 2"), waits("row 3"), waits("cell")], ["cell", "row 1"]),
        (1, False, [waits("row 1"), waits("row 2")], ["row 1"]),
        # Attention to everybody's cells costs more than another row brings, but with flash attention.
        (4, False, [waits("row 1", n=CROWD), waits("row 2", n=10)], ["row 1"]),
        (4, True, [waits("row 1", n=CROWD), waits("row 2", n=10)], ["row 1", "row 2"]),
        (4, False, [waits("cell 1", n=CROWD), waits("cell 2", n=10)], ["cell 1", "cell 2"]),
        # No more than the context holds.
        (4, True, [waits("row 1", n=3000), waits("row 2", n=3000)], ["row 1"]),
    ],
    ids=["kept", "cells first", "one slot", "crowd", "flash", "cells crowd", "size"],
)
def test_slots_are_given_to_cells_first_as_far_as_there_is_room(
    n_slots: int, flash: bool, sequences: list[Sequence], expected: list[str]
) -> None:
    made, slots, _ = schedule(n_slots, flash=flash)
    made.waiting.extend(sequences)
    made.admit()
    assert running(slots) == expected
    assert sorted([*running(slots), *names(made.waiting)]) == sorted(names(sequences))
    assert made.busy


def test_rows_make_way_for_a_cell_and_come_back_first() -> None:
    made, slots, _ = schedule(3, size=100)
    for i in (1, 2):
        made.waiting.append(waits(f"row {i}", n=40))
        made.admit()
    made.waiting.extend([waits("row 3", n=10), waits("cell", n=50)])
    made.admit()
    assert sorted(running(slots)) == ["cell", "row 1"]
    assert names(made.waiting) == ["row 2", "row 3"]


def test_room_is_made_until_one_is_left() -> None:
    made, slots, _ = schedule(3)
    made.waiting.extend([waits("row 1"), waits("row 2")])
    made.admit()
    assert made.make_room()
    assert (running(slots), names(made.waiting)) == (["row 1"], ["row 2"])
    assert not made.make_room()


def test_while_a_cell_runs_rows_take_part_in_some_steps_only() -> None:
    made, _, _ = schedule(3)
    assert made.turn() == []
    assert not made.busy
    made.waiting.extend([waits("row"), waits("cell")])
    made.admit()
    turns = [names(made.turn()) for _ in range(2 * BATCH_TURN)]
    both, one = ["cell", "row"], ["cell"]
    assert turns == 2 * [*[one] * (BATCH_TURN - 1), both]


def test_a_step_has_one_adapter_and_they_take_turns() -> None:
    made, _, adapters = schedule(4)
    made.waiting.extend(
        [waits("row 1", adapter="a"), waits("row 2", adapter="b"), waits("row 3", adapter="a")]
    )
    made.admit()
    turns = [names(made.turn()) for _ in range(4)]
    assert turns == 2 * [["row 2"], ["row 1", "row 3"]]
    assert adapters.applied == ["b", "a", "b", "a"]
