"""Speculative decoding: the same text in fewer steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.demo_engine import open_demo

from nbinfer.contract.errors import ConfigError
from nbinfer.contract.requests import CompletionRequest, Constraint, Sampling
from nbinfer.engines.llamacpp import Speculative
from nbinfer.engines.llamacpp.speculate import PromptLookup, Speculation, Tally, check_vocabularies
from nbinfer.models.demo import demo_embed_path, demo_path

if TYPE_CHECKING:
    from nbinfer.contract.results import Result
    from nbinfer.engines.llamacpp.generate import CompletionEngine

pytestmark = pytest.mark.engine

QUESTIONS = [
    "Repeat after me: cat dog sun moon tree house",
    "Write Python code to plot a sine wave.",
    "What is the capital of France?",
    "Give me JSON with the capital of Peru.",
    "List six animals.",
]


def answer(engine: CompletionEngine, question: str, **options: Any) -> Result:
    messages = ({"role": "user", "content": question},)
    result: Result = engine.submit(CompletionRequest(messages=messages, max_tokens=80, **options)).result(60)
    return result


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never pause: the demo model is so small that guessing always costs more than it saves."""
    monkeypatch.setattr(Speculation, "note_plain", _always_ready)
    monkeypatch.setattr("nbinfer.engines.llamacpp.speculate._WARM_STEPS", 10**9)


def _always_ready(self: Speculation, seconds: float) -> None:
    self._plain_steps, self._plain_step = 2, seconds


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("draft", [False, True])
def test_the_text_is_the_same_and_guesses_are_right(draft: bool) -> None:
    plain = open_demo()
    guessing = open_demo(speculative=Speculative(draft_path=demo_path() if draft else None, num_tokens=4))
    try:
        drafted = accepted = 0
        for question in QUESTIONS:
            expected, got = answer(plain, question), answer(guessing, question)
            assert got.text == expected.text
            assert got.finish_reason == expected.finish_reason
            assert got.usage.completion_tokens == expected.usage.completion_tokens
            drafted += got.usage.drafted_tokens
            accepted += got.usage.accepted_tokens
        assert drafted >= accepted > 0
        if draft:  # a model that drafts for itself is always right, but for the end
            assert accepted / drafted > 0.9
    finally:
        plain.close()
        guessing.close()


@pytest.mark.usefixtures("eager")
def test_constraints_limits_stops_and_logprobs_hold_while_guessing() -> None:
    engine = open_demo(speculative=Speculative(draft_path=demo_path(), num_tokens=8))
    try:
        assert answer(engine, "What is 2 plus 3?", constraint=Constraint("choices", ("4", "5"))).text in (
            "4",
            "5",
        )
        messages = ({"role": "user", "content": "Write Python code to plot a sine wave."},)
        cut = engine.submit(CompletionRequest(messages=messages, max_tokens=7)).result(60)
        assert (cut.usage.completion_tokens, cut.finish_reason) == (7, "length")
        stopped = engine.submit(CompletionRequest(messages=messages, stop=("import",))).result(60)
        assert stopped.text == "```python\n"
        scored = answer(engine, "What is the capital of France?", logprobs=1)
        assert "".join(entry.token for entry in scored.logprobs or ()) == scored.text
        again = answer(engine, "What is the capital of France?")
        assert again.text == "The capital of France is Paris."
    finally:
        engine.close()


@pytest.mark.usefixtures("eager")
def test_sampling_while_guessing_keeps_its_seed() -> None:
    engine = open_demo(exact=True, speculative=Speculative(num_tokens=4))
    try:
        sampling = Sampling(temperature=1.0, seed=5)
        texts = {answer(engine, "Tell me a story about a dog.", sampling=sampling).text for _ in range(3)}
        assert len(texts) == 1
    finally:
        engine.close()


def test_a_model_of_another_vocabulary_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="vocabular"):
        open_demo(speculative=Speculative(draft_path=demo_embed_path()))


def test_a_model_fits_its_own_vocabulary() -> None:
    engine = open_demo()
    try:
        check_vocabularies(engine._weights, engine._weights)
    finally:
        engine.close()


class Counting:
    """A drafter that always guesses, and counts."""

    def __init__(self) -> None:
        self.asked = 0

    def propose(self, tokens: Any, k: int) -> list[int]:
        self.asked += 1
        return [1] * k

    def close(self) -> None: ...


def run_steps(speculation: Speculation, steps: int, *, seconds: float, accepted: int) -> int:
    tokens, guessed = np.zeros(4, np.int32), 0
    for _ in range(steps):
        guesses = speculation.propose(tokens, 100)
        if guesses:
            guessed += 1
            speculation.note(Tally(), drafted=len(guesses), accepted=accepted, seconds=seconds)
        else:
            speculation.note_plain(1.0)
    return guessed


def test_guessing_that_loses_time_pauses_longer_and_longer() -> None:
    speculation = Speculation(Counting())
    guessed = run_steps(speculation, 400, seconds=2.0, accepted=0)
    assert guessed < 100
    assert run_steps(speculation, 400, seconds=2.0, accepted=0) < guessed


def test_guessing_that_wins_goes_on() -> None:
    assert run_steps(Speculation(Counting()), 400, seconds=1.5, accepted=3) >= 398


def test_guesses_below_the_asked_rate_pause_even_when_they_are_cheap() -> None:
    cheap = Speculation(Counting(), min_acceptance_rate=0.9)
    assert run_steps(cheap, 400, seconds=0.1, accepted=2) < 200


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6))
def test_lookup_proposes_only_what_followed_the_same_words_before(tokens: list[int], k: int) -> None:
    got = PromptLookup().propose(np.array(tokens, np.int32), k)
    assert len(got) <= k
    if got:
        found = [
            i
            for n in (4, 3, 2)
            for i in range(n, len(tokens))
            if tokens[i - n : i] == tokens[-n:] and tokens[i : i + k] == got
        ]
        assert found


def test_lookup_takes_the_latest_match() -> None:
    tokens = np.array([7, 8, 1, 1, 7, 8, 2, 2, 7, 8], np.int32)
    assert PromptLookup().propose(tokens, 2) == [2, 2]
    assert PromptLookup().propose(np.array([1, 2, 3], np.int32), 2) == []
