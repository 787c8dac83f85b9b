"""What the scheduler moves about: requests on their way, and the places they take in the context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nbinfer.engines.llamacpp.speculate import Tally
from nbinfer.engines.writing import Writing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.engines.llamacpp.media import Media
    from nbinfer.engines.llamacpp.sampling import Sampler


@dataclass(eq=False, slots=True)
class Scores:
    """The answers of one :class:`ScoreRequest`, each scored by a sequence of its own."""

    logprobs: NDArray[np.float64]
    left: int
    cached: int = 0


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence(Writing):
    """One request on its way through the engine.

    With ``scores`` it writes no text: it follows ``script``, the tokens of answer number ``answer_index``,
    and adds up how likely each was.
    """

    prompt: NDArray[np.int32]
    sampler: Sampler
    media: Media | None = None
    scores: Scores | None = None
    script: list[int] = field(default_factory=list)
    answer_index: int = 0
    cut_short: bool = False
    guesses: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    slot: int = -1
    position: int = 0
    done: bool = False
    alone: bool = False
    """Images that did not go in beside others."""

    @property
    def length(self) -> int:
        """Tokens known so far: prompt and answer."""
        return len(self.prompt) + len(self.generated)

    @property
    def cells(self) -> int:
        """Cells of the context that it takes: an image may take more of them than it has positions."""
        images = 0 if self.media is None else self.media.n_tokens - len(self.media.placeholders)
        return self.length + images

    @property
    def generating(self) -> bool:
        """Whether all but the newest token is in the context."""
        return bool(self.generated) and self.position == self.length - 1

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens ``start`` to ``stop`` of prompt and answer together, int32."""
        n = len(self.prompt)
        if stop <= n:
            return self.prompt[start:stop]
        tail = np.array(self.generated[max(0, start - n) : stop - n], np.int32)
        return tail if start >= n else np.concatenate([self.prompt[start:], tail])


@dataclass(eq=False, slots=True)
class Slot:
    """A place for one sequence in the context, and what its memory holds; ``row``: left by a batch row."""

    index: int
    sequence: Sequence | None = None
    adapter: str | None = None
    held: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    released: float = 0.0
    row: bool = False


def youth(slot: Slot) -> tuple[bool, float]:
    """Sorts batch rows after cells, and the newest last."""
    sequence = slot.sequence
    return (False, 0.0) if sequence is None else (not sequence.interactive, sequence.started or 0.0)


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the common beginning of two token arrays."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
