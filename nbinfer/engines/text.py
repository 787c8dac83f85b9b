"""From token bytes to text that can be shown: whole characters, stop strings, reasoning apart."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """New text: of the answer, of the reasoning; ``stopped`` when a stop string was met."""

    text: str = ""
    reasoning: str = ""
    stopped: bool = False


def held_back(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that could be the beginning of a marker."""
    longest = max((len(m) for m in markers), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        tail = text[-n:]
        if any(m.startswith(tail) for m in markers):
            return n
    return 0


class TextAssembler:
    """Turns the bytes of successive tokens into text.

    A character may span tokens, and so may a stop string: text is held back only while it could still turn
    out to be one.

    Parameters
    ----------
    stop
        Strings that end the answer; none of their text is let through.
    reasoning
        Whether a leading ``<think>…</think>`` is told apart from the answer.
    inside_reasoning
        Whether the prompt already opened the reasoning.
    """

    def __init__(
        self, stop: tuple[str, ...] = (), *, reasoning: bool = False, inside_reasoning: bool = False
    ) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._state = "reasoning" if inside_reasoning else "start" if reasoning else "answer"
        self._pending = ""
        self._after_reasoning = False

    @property
    def in_reasoning(self) -> bool:
        """Whether the model is thinking, not answering."""
        return self._state == "reasoning"

    def push(self, data: bytes) -> Piece:
        """Add the bytes of a token."""
        return self._advance(self._decoder.decode(data))

    def finish(self) -> Piece:
        """Let go of what was held back; call once, at the end."""
        piece = self._advance(self._decoder.decode(b"", final=True))
        if piece.stopped:
            return piece
        rest, self._pending = self._pending, ""
        if self._state == "reasoning":
            return Piece(piece.text, piece.reasoning + rest)
        return Piece(piece.text + rest, piece.reasoning)

    def _advance(self, text: str) -> Piece:
        self._pending += text
        reasoning = ""
        if self._state == "start":
            self._leave_start()
        if self._state == "reasoning":
            reasoning = self._take_reasoning()
        if self._state != "answer":
            return Piece(reasoning=reasoning)
        if self._after_reasoning:
            self._pending = self._pending.lstrip("\n")
            self._after_reasoning = not self._pending
        answer, stopped = self._take_answer()
        return Piece(answer, reasoning, stopped)

    def _leave_start(self) -> None:
        begin = self._pending.lstrip()
        if begin.startswith(THINK_OPEN):
            self._pending = begin.removeprefix(THINK_OPEN).lstrip("\n")
            self._state = "reasoning"
        elif begin and not THINK_OPEN.startswith(begin):
            self._state = "answer"

    def _take_reasoning(self) -> str:
        before, found, after = self._pending.partition(THINK_CLOSE)
        if found:
            self._pending, self._state, self._after_reasoning = after, "answer", True
            return before
        keep = held_back(self._pending, (THINK_CLOSE,))
        cut = len(self._pending) - keep
        taken, self._pending = self._pending[:cut], self._pending[cut:]
        return taken

    def _take_answer(self) -> tuple[str, bool]:
        if not self._stop:
            taken, self._pending = self._pending, ""
            return taken, False
        hits = [i for i in (self._pending.find(s) for s in self._stop) if i >= 0]
        if hits:
            taken, self._pending = self._pending[: min(hits)], ""
            return taken, True
        cut = len(self._pending) - held_back(self._pending, self._stop)
        taken, self._pending = self._pending[:cut], self._pending[cut:]
        return taken, False
