"""Constrained decoding with llguidance: which tokens may come next."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import EngineError
from nbinfer.engines.grammar import checked_grammar
from nbinfer.engines.llamacpp.library import library

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.contract.requests import Constraint
    from nbinfer.engines.llamacpp.weights import Weights


class Constrainer:
    """Makes matchers for one model; its tokenizer table (about a second at 150,000 tokens) is built once."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """Return a fresh matcher for one output.

        Raises
        ------
        RequestError
            The schema, expression or grammar is not valid.
        BackendUnavailable
            llguidance is not installed.
        """
        grammar = checked_grammar(constraint, self._tokens)
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self._tokenizer, grammar), self._weights)

    def _tokens(self) -> Any:
        import llguidance

        # Its stubs know nothing of llama.cpp.
        kind: Any = llguidance.LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                weights = self._weights
                self._tokenizer = kind.from_llamacpp(
                    tokens=[_token_bytes(weights, token) for token in range(weights.n_vocab)],
                    vocab_ptr=weights.vocab,
                    tokenize_fptr=ctypes.cast(library().llama_tokenize, ctypes.c_void_p).value,
                    eos_token=sorted(weights.end_tokens),
                )
            return self._tokenizer


def _token_bytes(weights: Weights, token: int) -> bytes:
    """A token's bytes as llguidance wants them: control tokens are marked with a byte no text has."""
    data = weights.render_piece(token, special=True)
    looks_special = data.startswith(b"<") and data.endswith(b">")
    control, user_defined = weights.token_kind(token)
    return b"\xff" + data if control or (user_defined and looks_special) else data


class Matcher:
    """Follows one output through its grammar."""

    def __init__(self, matcher: Any, weights: Weights) -> None:
        self._matcher = matcher
        self._n_vocab = weights.n_vocab
        self._ends = weights.end_tokens
        self._words = np.empty((weights.n_vocab + 31) // 32, np.int32)

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of tokens that may not come next to minus infinity, in place."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        allowed = np.unpackbits(self._words.view(np.uint8), bitorder="little")[: self._n_vocab]
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> None:
        """Take a chosen token."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def accepting(self) -> bool:
        """Whether the output so far is whole."""
        return bool(self._matcher.is_accepting() or self._matcher.is_stopped())

    def forced(self) -> list[int]:
        """Tokens that are the only possible continuation; take them with :meth:`accept`."""
        return [t for t in self._matcher.compute_ff_tokens() if t not in self._ends]

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"the constraint failed while decoding: {self._matcher.get_error()[:300]}")
