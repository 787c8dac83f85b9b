"""Choosing the next token of one sequence."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import EngineError, RequestError
from nbinfer.contract.results import TokenLogprob
from nbinfer.engines.llamacpp.library import library

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from nbinfer.contract.requests import Sampling
    from nbinfer.engines.llamacpp.constrain import Matcher

_PENALTY_WINDOW = 64
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """One sequence's way of choosing tokens, with its own random state.

    Greedy choice is an argmax over the logits. Everything else goes through llama.cpp's sampler chain, in
    its usual order: bias, penalties, top-k, top-p, min-p, temperature, draw.

    Parameters
    ----------
    seed
        Seed of the draw; the sampling's own seed, or the one that was drawn for it.
    matcher
        The constraint that every token obeys, or None.
    """

    def __init__(
        self, sampling: Sampling, *, seed: int, n_vocab: int, matcher: Matcher | None = None
    ) -> None:
        self._lib = library()
        self._n_vocab = n_vocab
        self.matcher = matcher
        self._bias = self._bias_of(sampling)
        self._greedy = sampling.temperature == 0
        penalised = (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (
            1,
            0,
            0,
        )
        self._chain: Any = (
            None if self._greedy and not penalised else self._make_chain(sampling, seed, penalised=penalised)
        )

    def _bias_of(self, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        if not sampling.logit_bias:
            return None
        ids = np.array([int(t) for t in sampling.logit_bias], np.int64)
        if ids.min() < 0 or ids.max() >= self._n_vocab:
            raise RequestError(f"logit_bias names a token outside the vocabulary (0 to {self._n_vocab - 1}).")
        return ids, np.array(list(sampling.logit_bias.values()), np.float32)

    def _make_chain(self, sampling: Sampling, seed: int, *, penalised: bool) -> Any:
        lib = self._lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())

        def add(link: Any) -> None:
            lib.llama_sampler_chain_add(chain, link)

        if penalised:
            add(
                lib.llama_sampler_init_penalties(
                    self._n_vocab,
                    _PENALTY_WINDOW,
                    sampling.repeat_penalty,
                    sampling.frequency_penalty,
                    sampling.presence_penalty,
                ),
            )
        if self._greedy:
            add(lib.llama_sampler_init_greedy())
            return chain
        if sampling.top_k > 0:
            add(lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        add(lib.llama_sampler_init_temp(sampling.temperature))
        # llama.cpp takes the largest seed for "draw one"; its neighbour stands in for it.
        add(lib.llama_sampler_init_dist(min(seed, 2**32 - 2)))
        return chain

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token and remember it. ``logits`` (shape (vocabulary,)) are not changed.

        Raises
        ------
        EngineError
            The logits are not numbers, or the constraint allows no token.
        """
        if self._bias is not None or self.matcher is not None:
            logits = logits.copy()
            if self._bias is not None:
                np.add.at(logits, self._bias[0], self._bias[1])
            if self.matcher is not None:
                self.matcher.mask(logits)
        token = int(logits.argmax()) if self._chain is None else self._draw(logits)
        if not np.isfinite(logits[token]):
            raise EngineError(
                "the model produced no usable scores for the next token (all are NaN or excluded)."
            )
        if self._chain is not None:
            self._lib.llama_sampler_accept(self._chain, token)
        if self.matcher is not None:
            self.matcher.accept(token)
        return token

    def _draw(self, logits: NDArray[np.float32]) -> int:
        lib = self._lib
        candidates = np.empty(self._n_vocab, _CANDIDATE)
        candidates["id"] = np.arange(self._n_vocab, dtype=np.int32)
        candidates["logit"] = logits
        candidates["p"] = 0
        kept = candidates[np.isfinite(logits)] if self.matcher is not None else candidates
        if not len(kept):
            raise EngineError("the constraint allows no token here.")
        array = lib.llama_token_data_array(
            data=ctypes.cast(kept.ctypes.data, ctypes.POINTER(lib.llama_token_data)),
            size=len(kept),
            selected=-1,
            sorted=False,
        )
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def close(self) -> None:
        """Free the chain; idempotent."""
        if self._chain is not None:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None


def logprob_of(
    logits: NDArray[np.float32],
    token: int,
    k: int,
    text: Callable[[int], str],
) -> TokenLogprob:
    """Natural-log probability of ``token`` and the ``k`` most likely tokens, before any sampling cut."""
    values = logits.astype(np.float64)
    peak = values.max()
    log_total = float(peak + np.log(np.exp(values - peak).sum()))
    best: list[int] = []
    if k:
        some = np.argpartition(values, -k)[-k:]
        best = [int(t) for t in some[np.argsort(values[some])[::-1]]]
    return TokenLogprob(
        text(token),
        float(values[token]) - log_total,
        tuple((text(t), float(values[t]) - log_total) for t in best),
    )
