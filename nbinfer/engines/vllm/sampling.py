"""A request in the words of vLLM's ``SamplingParams``.

vLLM's penalties look at the whole prompt and answer, where llama.cpp's look at the last 64 tokens.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from nbinfer.engines.grammar import JSON_STYLE, checked_grammar, guidance_grammar, lark_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.contract.requests import CompletionRequest, Constraint

BATCH_INTERVAL = 32
"""Tokens of a batch row that are handed on together: nobody watches a row being written."""

# vLLM wants a share above 0; so little is the most likely token alone.
_LEAST_TOP_P = 1e-6


def sampling_words(request: CompletionRequest, *, seed: int, limit: int) -> dict[str, Any]:
    """Return how an answer's tokens are chosen, as JSON-able values: vLLM's server takes the same words.

    Parameters
    ----------
    seed
        Seed of the draw, where one is made.
    limit
        Tokens of the answer at most.
    """
    sampling = request.sampling
    words: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_tokens": limit,
        "logprobs": request.logprobs,
        "repetition_penalty": sampling.repeat_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.temperature > 0:
        words |= {
            "top_p": max(sampling.top_p, _LEAST_TOP_P),
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "seed": seed,
        }
    if sampling.logit_bias:
        words["logit_bias"] = dict(sampling.logit_bias)
    if request.constraint is not None:
        words["structured_outputs"] = _structured(request.constraint)
    return words


def sampling_params(request: CompletionRequest, *, seed: int, limit: int, each: bool) -> Any:
    """Return the ``vllm.SamplingParams`` of a request.

    Parameters
    ----------
    seed, limit
        As for :func:`sampling_words`.
    each
        Whether every token is handed on at once.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    words = sampling_words(request, seed=seed, limit=limit)
    if "structured_outputs" in words:
        words["structured_outputs"] = StructuredOutputsParams(**words["structured_outputs"])
    if not each and "stream_interval" in SamplingParams.__struct_fields__:
        words["stream_interval"] = BATCH_INTERVAL
    return SamplingParams(**words, output_kind=RequestOutputKind.DELTA)


def scoring_params(tokens: Sequence[int]) -> Any:
    """Return the ``vllm.SamplingParams`` that ask how likely each of ``tokens`` is to come next."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=list(tokens), detokenize=False)


def _structured(constraint: Constraint) -> dict[str, Any]:
    kind, value = constraint.kind, constraint.value
    if kind in ("json_schema", "json"):
        schema: dict[str, Any] = {"type": "object"} if value is None else dict(value)
        # llguidance reads its options in the schema itself, where there may be some.
        return {"json": {**schema, "x-guidance": {**JSON_STYLE, **schema.get("x-guidance", {})}}}
    if kind == "regex":
        return {"regex": value}
    return {"grammar": lark_text(constraint)}


class Constraints:
    """Checks constraints before they run, and answers after they were cut.

    Parameters
    ----------
    tokenizer
        The model's, as transformers loads it.
    size
        Rows of the model's output.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._source, self._size = tokenizer, size
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def check(self, constraint: Constraint) -> None:
        """Refuse what cannot be a constraint.

        Raises
        ------
        RequestError
            The schema, expression or grammar is not valid.
        BackendUnavailable
            llguidance is not installed.
        """
        checked_grammar(constraint, self._tokens)

    def whole(self, constraint: Constraint, tokens: Sequence[int]) -> bool:
        """Whether an answer of these tokens, its end token left out, keeps to the constraint to its end."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens(), guidance_grammar(constraint))
        matcher.consume_tokens(list(tokens))
        return bool(matcher.is_accepting() or matcher.is_stopped())

    def _tokens(self) -> Any:
        """Return the tokens as llguidance wants them: about a second for 150,000, and made once."""
        from llguidance import hf

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = hf.from_tokenizer(self._source, self._size)
            return self._tokenizer
