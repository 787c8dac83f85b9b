"""Speculative decoding: guess the next tokens cheaply, let the model check them in one step.

The model samples every token itself, from its own scores, so the text is what it would have been; guesses
only decide how many tokens one step yields. Guesses come from the text so far (prompt lookup) or from a small
model. Speculation watches its own gain and pauses when it loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nbinfer.contract.errors import ConfigError
from nbinfer.engines.llamacpp.context import OK, Context

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.engines.llamacpp.context import ContextSettings
    from nbinfer.engines.llamacpp.weights import Weights

DEFAULT_TOKENS = 4
_NGRAMS = (4, 3, 2)
_LOOKBACK = 8192
_MIN_CONFIDENCE = 0.4
_WARM_STEPS = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 1024
_SMOOTHING = 0.2
_CHECKED_PIECES = 512
_VOCAB_SLACK = 128


class Drafter(Protocol):
    """Something that guesses."""

    def propose(self, tokens: NDArray[np.int32], k: int) -> list[int]:
        """Up to ``k`` tokens that may follow ``tokens``."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class PromptLookup:
    """Guesses that a phrase goes on as it did before: good where the answer repeats the prompt."""

    def propose(self, tokens: NDArray[np.int32], k: int) -> list[int]:
        """Return what followed the latest earlier occurrence of the last few tokens."""
        recent = tokens[-_LOOKBACK:]
        for n in _NGRAMS:
            if len(recent) <= n:
                continue
            tail = recent[-n:]
            windows = len(recent) - n  # every window but the tail itself
            hits = np.ones(windows, np.bool_)
            for i in range(n):
                hits &= recent[i : windows + i] == tail[i]
            found = np.flatnonzero(hits)
            if len(found):
                start = int(found[-1]) + n
                return [int(t) for t in recent[start : start + k]]
        return []

    def close(self) -> None:
        """Nothing to free."""


class DraftModel:
    """A small model of the same vocabulary that writes ahead greedily while it is fairly sure."""

    def __init__(self, weights: Weights, settings: ContextSettings) -> None:
        self._weights = weights
        self._context = Context(weights, settings, parallel=1)
        self._held = np.empty(0, np.int32)

    def propose(self, tokens: NDArray[np.int32], k: int) -> list[int]:
        """Return up to ``k`` tokens, fewer when the model is unsure or ends the text."""
        if len(tokens) + k >= self._context.size:
            return []
        n = min(len(self._held), len(tokens) - 1)
        differs = np.flatnonzero(self._held[:n] != tokens[:n])
        kept = int(differs[0]) if len(differs) else n
        if not self._context.drop(0, kept):
            self._context.drop(0)
            kept = 0
        index, at = -1, kept
        while at < len(tokens):
            piece = tokens[at : at + self._context.n_ubatch]
            index = self._context.add(0, piece, at, output=at + len(piece) == len(tokens))
            if self._context.decode() != OK:
                self._held = tokens[:0]
                self._context.drop(0)
                return []
            at += len(piece)
        guesses: list[int] = []
        while True:
            logits = self._context.logits(index)
            token = int(logits.argmax())
            shifted = np.exp(logits - logits[token])
            if token in self._weights.end_tokens or 1 / float(shifted.sum()) < _MIN_CONFIDENCE:
                break
            guesses.append(token)
            if len(guesses) == k:
                break
            index = self._context.add(0, [token], len(tokens) + len(guesses) - 1, output=True)
            if self._context.decode() != OK:
                break
        # The last guess itself was not decoded.
        self._held = np.concatenate([tokens, np.array(guesses[: max(0, len(guesses) - 1)], np.int32)])
        return guesses

    def close(self) -> None:
        """Free the small model."""
        self._context.close()
        self._weights.close()


@dataclass(slots=True)
class Tally:
    """What speculation did for one answer: tokens drafted and accepted, seconds spent and saved."""

    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0

    @property
    def speedup(self) -> float | None:
        """Time that the tokens would have taken one by one, over the time they took."""
        return self.plain_seconds / self.seconds if self.seconds > 0 else None


class Speculation:
    """Decides when to guess, and keeps the account.

    Parameters
    ----------
    num_tokens
        Most tokens guessed at once.
    min_acceptance_rate
        Pause when a smaller share of the guesses is right; None: only when it costs time.
    """

    def __init__(
        self, drafter: Drafter, *, num_tokens: int = DEFAULT_TOKENS, min_acceptance_rate: float | None = None
    ) -> None:
        self._drafter = drafter
        self.num_tokens = num_tokens
        self._min_rate = min_acceptance_rate or 0.0
        self._plain_step = 0.0
        self._gain = 1.0
        self._rate = 1.0
        self._steps = 0
        self._plain_steps = 0
        self._pause = 0
        self._next_pause = _FIRST_PAUSE

    def propose(self, tokens: NDArray[np.int32], room: int) -> list[int]:
        """Return guesses to check, none while plain steps are being timed or guessing does not pay."""
        if self._plain_steps < 2 or self._pause > 0:  # noqa: PLR2004 - two plain steps give a time to compare with
            return []
        return self._drafter.propose(tokens, min(self.num_tokens, room)) if room > 0 else []

    def note_plain(self, seconds: float) -> None:
        """A step without guesses took ``seconds``."""
        self._plain_steps += 1
        self._pause = max(0, self._pause - 1)
        known = self._plain_step
        self._plain_step = known + _SMOOTHING * (seconds - known) if known else seconds

    def note(self, tally: Tally, *, drafted: int, accepted: int, seconds: float) -> None:
        """A step with guesses took ``seconds`` and yielded ``accepted`` + 1 tokens."""
        worth = (accepted + 1) * self._plain_step
        tally.drafted += drafted
        tally.accepted += accepted
        tally.seconds += seconds
        tally.plain_seconds += worth
        self._steps += 1
        self._gain += _SMOOTHING * (worth / max(seconds, 1e-9) - self._gain)
        self._rate += _SMOOTHING * (accepted / drafted - self._rate)
        if self._steps < _WARM_STEPS:
            return
        if self._gain < 1 or self._rate < self._min_rate:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
            self._steps, self._gain, self._rate = 0, 1.0, 1.0
        else:
            self._next_pause = _FIRST_PAUSE

    def close(self) -> None:
        """Free the drafter."""
        self._drafter.close()


def check_vocabularies(model: Weights, draft: Weights) -> None:
    """Raise ``ConfigError`` unless both models mean the same text by the same token."""
    n = min(model.n_vocab, draft.n_vocab)
    problem = ""
    if abs(model.n_vocab - draft.n_vocab) > _VOCAB_SLACK:
        problem = f"they have {model.n_vocab:,} and {draft.n_vocab:,} tokens"
    elif model.special_token("eos") != draft.special_token("eos"):
        problem = "their end tokens differ"
    else:
        for token in range(0, n, max(1, n // _CHECKED_PIECES)):
            a, b = (w.render_piece(token, special=True) for w in (model, draft))
            if a != b:
                problem = f"token {token} is {a!r:.30} in one and {b!r:.30} in the other"
                break
    if problem:
        raise ConfigError(
            f"{draft.path.stem} cannot draft for {model.path.stem}: their vocabularies differ ({problem}).\n"
            "Take a smaller model of the same family, or leave draft_model out to guess from the prompt.",
        )
