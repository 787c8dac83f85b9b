"""What runs in vLLM on somebody's behalf: an answer being written, and a token whose likelihood is asked."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nbinfer.contract.errors import EngineError
from nbinfer.contract.results import (
    Delta,
    Finished,
    PromptProgress,
    ScoreResult,
    TokenLogprob,
)
from nbinfer.engines.vllm.sampling import sampling_params, scoring_params
from nbinfer.engines.writing import Writing, cut_short, result_of

if TYPE_CHECKING:
    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.results import FinishReason
    from nbinfer.engines.stream import Stream
    from nbinfer.engines.vllm.sampling import Constraints


class Job(Protocol):
    """One sequence of vLLM."""

    stream: Stream
    interactive: bool
    adapter: str | None
    started: float | None

    def prompt(self) -> dict[str, Any]:
        """Return what vLLM is given: token ids, and images."""
        ...

    def params(self) -> Any:
        """Return vLLM's sampling parameters."""
        ...

    def take(self, output: Any) -> Outcome:
        """Take one of vLLM's outputs."""
        ...

    def interrupt(self) -> None:
        """End it where it is."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens in the context."""
        ...

    @property
    def order(self) -> list[int]:
        """What jobs are sorted by, so that those that begin alike run together."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an output changed: tokens computed and generated, and whether the job is done or starts again."""

    prompt_tokens: int = 0
    generated: int = 0
    done: bool = False
    again: bool = False


@dataclass(eq=False, slots=True, kw_only=True)
class Answer(Writing):
    """A completion."""

    model: str
    tokens: list[int]
    images: list[Any]
    budget: int | None
    thought_end: list[int]
    ends: frozenset[int]
    constraints: Constraints
    n_prompt: int = 0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens in the context."""
        return self.n_prompt + len(self.generated)

    @property
    def order(self) -> list[int]:
        """The prompt."""
        return self.tokens

    def prompt(self) -> dict[str, Any]:
        """Return what vLLM is given; after the thoughts were cut off, with what was written so far."""
        prompt: dict[str, Any] = {"prompt_token_ids": [*self.tokens, *self.generated]}
        if self.images:
            prompt["multi_modal_data"] = {"image": self.images}
        return prompt

    def params(self) -> Any:
        """Return vLLM's sampling parameters."""
        each = self.interactive or bool(self.request.stop) or self.budget is not None
        limit = self.limit - len(self.generated)
        return sampling_params(self.request, seed=self.seed, limit=limit, each=each)

    def take(self, output: Any) -> Outcome:
        """Take new tokens and their text."""
        now = time.perf_counter()
        computed = self._note_prompt(output, now)
        new = output.outputs[0]
        tokens, logprobs = list(new.token_ids), list(new.logprobs or ())
        if new.finish_reason == "stop" and tokens and tokens[-1] in self.ends:
            del tokens[-1], logprobs[len(tokens) :]
        if tokens:
            self.last_token = now
        self.generated += tokens
        if self.request.logprobs is not None:
            self.logprobs += [self._logprob(*pair) for pair in zip(tokens, logprobs, strict=True)]
        piece = self.assembler.push(new.text.encode("utf-8", "surrogatepass"))
        self._emit(piece.text, piece.reasoning, len(tokens))
        if piece.stopped:
            self._finish("stop")
        elif output.finished:
            self._finish("stop" if new.finish_reason == "stop" else "length")
        elif self._thought_enough(len(tokens)):
            return self._end_thought(computed, len(tokens))
        else:
            return Outcome(computed, len(tokens))
        return Outcome(computed, len(tokens), done=True)

    def _note_prompt(self, output: Any, now: float) -> int:
        """Note that the prompt is computed, once; returns how many of its tokens were."""
        if self.prompt_done is not None:
            return 0
        self.prompt_done = now
        # With images it is longer than what was sent.
        self.n_prompt = len(output.prompt_token_ids or self.tokens)
        self.cached = output.num_cached_tokens or 0
        self.stream.put(PromptProgress(self.n_prompt, self.n_prompt, self.cached))
        return self.n_prompt - self.cached

    def _thought_enough(self, n_new: int) -> bool:
        if not self.assembler.in_reasoning:
            return False
        self.thoughts += n_new
        return self.budget is not None and self.budget >= 0 and self.thoughts > self.budget

    def _end_thought(self, computed: int, n_new: int) -> Outcome:
        """Close the reasoning in the model's stead; the answer then goes on from there."""
        self.budget = None
        self.generated += self.thought_end
        piece = self.assembler.push(b"\n</think>\n\n")
        self._emit(piece.text, piece.reasoning, len(self.thought_end))
        if len(self.generated) >= self.limit:
            del self.generated[self.limit :]
            self._finish("length")
            return Outcome(computed, n_new, done=True)
        return Outcome(computed, n_new, again=True)

    def _logprob(self, token: int, found: dict[int, Any]) -> TokenLogprob:
        # vLLM gives the chosen token also where it is not among the most likely ones.
        top = sorted(
            (each for each in found.values() if each.rank <= (self.request.logprobs or 0)),
            key=lambda each: each.rank,
        )
        chosen = found[token]
        return TokenLogprob(
            chosen.decoded_token, chosen.logprob, tuple((each.decoded_token, each.logprob) for each in top)
        )

    def _emit(self, text: str, reasoning: str, n_tokens: int) -> None:
        if reasoning:
            self.reasoning.append(reasoning)
            self.stream.put(Delta(reasoning, n_tokens, reasoning=True))
        if text:
            self.answer.append(text)
            self.stream.put(Delta(text, n_tokens if not reasoning else 0))

    def interrupt(self) -> None:
        """End it where it is; what was written is the result."""
        self._finish("interrupted")

    def _finish(self, reason: FinishReason) -> None:
        rest = self.assembler.finish()
        self._emit(rest.text, rest.reasoning, 0)
        result = result_of(self, reason, model=self.model, prompt_tokens=self.n_prompt)
        if reason == "length" and not self._whole():
            self.stream.fail(cut_short(result, f"{len(self.generated)} tokens"))
            return
        self.stream.put(Finished(result))

    def _whole(self) -> bool:
        """Whether the answer, where it ends now, keeps to its constraint."""
        constraint = self.request.constraint
        return constraint is None or self.constraints.whole(constraint, self.generated)


@dataclass(eq=False, slots=True, kw_only=True)
class Scoring:
    """Answers whose likelihood is asked: a tree of their tokens, of which each inner node is asked once."""

    stream: Stream
    model: str
    tokens: list[int]
    answers: list[list[int]]
    ends: frozenset[int]
    submitted: float
    interactive: bool
    adapter: str | None
    left: int = 0
    cached: int = 0
    found: dict[tuple[int, ...], dict[int, float]] = field(default_factory=dict)

    def nodes(self) -> list[Node]:
        """Return what to ask: for each beginning of an answer, what may follow it."""
        follow: dict[tuple[int, ...], set[int]] = {}
        for answer in self.answers:
            for i, token in enumerate(answer):
                follow.setdefault(tuple(answer[:i]), set()).add(token)
            follow.setdefault(tuple(answer), set()).update(self.ends)
        self.left = len(follow)
        return [Node(self, beginning, sorted(tokens)) for beginning, tokens in follow.items()]

    def put(self, beginning: tuple[int, ...], logprobs: dict[int, float], cached: int) -> None:
        """Take what one node gave; the last one makes the result."""
        self.found[beginning] = logprobs
        self.cached = max(self.cached, min(cached, len(self.tokens)))
        self.left -= 1
        if self.left:
            return
        result = ScoreResult(
            logprobs=np.array([self._logprob(answer) for answer in self.answers]),
            prompt_tokens=len(self.tokens),
            cached_tokens=self.cached,
            model=self.model,
            seconds=time.perf_counter() - self.submitted,
        )
        self.stream.put(Finished(result))

    def _logprob(self, answer: list[int]) -> float:
        steps = [self.found[tuple(answer[:i])][token] for i, token in enumerate(answer)]
        last = self.found[tuple(answer)]
        return float(sum(steps) + np.logaddexp.reduce([last[end] for end in self.ends]))


@dataclass(eq=False, slots=True)
class Node:
    """One question of a scoring: how likely each of ``follow`` is after ``beginning``."""

    scoring: Scoring
    beginning: tuple[int, ...]
    follow: list[int]
    started: float | None = None

    @property
    def stream(self) -> Stream:
        """The scoring's."""
        return self.scoring.stream

    @property
    def interactive(self) -> bool:
        """Whether somebody waits at a cell."""
        return self.scoring.interactive

    @property
    def adapter(self) -> str | None:
        """The adapter it runs under."""
        return self.scoring.adapter

    @property
    def n_tokens(self) -> int:
        """Tokens in the context."""
        return len(self.scoring.tokens) + len(self.beginning)

    @property
    def order(self) -> list[int]:
        """The prompt."""
        return self.scoring.tokens

    def prompt(self) -> dict[str, Any]:
        """Return what vLLM is given."""
        return {"prompt_token_ids": [*self.scoring.tokens, *self.beginning]}

    def params(self) -> Any:
        """Return vLLM's sampling parameters."""
        return scoring_params(self.follow)

    def take(self, output: Any) -> Outcome:
        """Take the log-probabilities."""
        if not output.finished:
            return Outcome()
        (found,) = output.outputs[0].logprobs
        cached = output.num_cached_tokens or 0
        self.scoring.put(self.beginning, {token: found[token].logprob for token in self.follow}, cached)
        return Outcome(self.n_tokens - cached, 0, done=True)

    def interrupt(self) -> None:
        """End the scoring: half of it is worth nothing."""
        self.fail(EngineError("the scoring was interrupted."))

    def fail(self, error: NbinferError) -> None:
        """End it with an error."""
        self.stream.fail(error)
