"""The batch loop on the real demo model."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from support.demo_engine import open_demo
from support.plain_llama import plain_llama

from nbinfer.contract.errors import (
    ContextOverflow,
    EngineClosed,
    EngineError,
    ModelLoadError,
    NbinferError,
    NotSupported,
    RequestError,
    SchemaError,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, Constraint, EmbeddingRequest, Sampling, ScoreRequest
from nbinfer.contract.results import Delta, Finished, PromptProgress, Result
from nbinfer.engines.llamacpp.context import NO_SPACE

if TYPE_CHECKING:
    from pathlib import Path

    from support.demo_engine import Ask

    from nbinfer.engines.llamacpp.generate import CompletionEngine

pytestmark = pytest.mark.engine

COUNTRIES = (
    "Hungary France Italy Spain Germany Japan China Egypt Greece Poland Norway Peru Chile Cuba".split()
)
QUESTIONS = [
    *(f"What is the capital of {c}?" for c in COUNTRIES),
    *(f"Name the capital of {c}." for c in COUNTRIES),
    *(f"What is {a} plus {b}?" for a, b in [(2, 3), (4, 4), (9, 1), (7, 5), (0, 6), (8, 8)]),
    *(f"What is the opposite of {w}?" for w in "hot big fast up old open wet early".split()),
    "Write Python code to plot a sine wave.",
    "How do I read a CSV file in Python?",
    "Tell me a story about a dog.",
    "List three colors.",
    "Count from 3 to 9.",
    "Who are you?",
    "Hello!",
    "What color is snow?",
    "What day comes after Monday?",
    "Give me JSON with the capital of Peru.",
]


def test_events_are_progress_text_and_the_result(ask: Ask) -> None:
    events = list(ask("What is the capital of France?"))
    assert isinstance(events[0], PromptProgress)
    assert isinstance(events[-1], Finished)
    result = events[-1].result
    assert isinstance(result, Result)
    assert result.text == "The capital of France is Paris."
    assert "".join(e.text for e in events if isinstance(e, Delta)) == result.text
    assert result.finish_reason == "stop"
    assert result.usage.prompt_tokens > 0
    assert result.usage.completion_tokens == 11
    assert result.prompt.endswith("<|im_start|>assistant\n")


def test_greedy_text_equals_llama_cpp_pythons_own() -> None:
    assert len(QUESTIONS) >= 50
    from nbinfer.models.demo import demo_path

    engine = open_demo()
    try:
        ours = [engine.submit(_request(q, n=60)).result().text for q in QUESTIONS]
    finally:
        engine.close()
    with plain_llama(demo_path(), n_ctx=1024) as plain:
        theirs = [
            plain.create_chat_completion(
                [{"role": "user", "content": q}],
                temperature=0,
                repeat_penalty=1.0,
                max_tokens=60,
            )["choices"][0]["message"]["content"]
            for q in QUESTIONS
        ]
    assert ours == theirs


@pytest.mark.parametrize("parallel", [1, 3, 16])
def test_text_does_not_depend_on_what_runs_beside_it(parallel: int) -> None:
    alone = open_demo(parallel=1)
    together = open_demo(parallel=parallel)
    try:
        requests = [_request(q) for q in QUESTIONS]
        expected = [alone.submit(r).result().text for r in requests]
        streams = [together.submit(r) for r in requests]
        assert [s.result().text for s in streams] == expected
    finally:
        alone.close()
        together.close()


def test_a_shared_prefix_is_computed_once() -> None:
    engine = open_demo()
    try:
        system = "Answer with one word. " + "Be kind. " * 20
        streams = [
            engine.submit(
                CompletionRequest(
                    messages=({"role": "system", "content": system}, {"role": "user", "content": q}),
                    priority="batch",
                    max_tokens=8,
                ),
            )
            for q in QUESTIONS[:20]
        ]
        results = [s.result() for s in streams]
    finally:
        engine.close()
    shared = min(r.usage.cached_tokens for r in results[1:])
    assert results[0].usage.cached_tokens == 0
    assert shared > 80
    assert engine.load().prompt_tokens < sum(r.usage.prompt_tokens for r in results) / 2


def test_the_same_seed_gives_the_same_text_and_another_one_another() -> None:
    engine = open_demo(exact=True)

    def told(seed: int | None) -> Result:
        sampling = Sampling(temperature=1.5, seed=seed, top_k=0, top_p=1, min_p=0)
        messages = ({"role": "user", "content": "Tell me a story about a dog."},)
        result = engine.submit(CompletionRequest(messages=messages, sampling=sampling)).result()
        assert isinstance(result, Result)
        return result

    try:
        assert told(1).text == told(1).text
        assert len({told(s).text for s in range(5)}) > 1
        drawn = told(None)
        assert told(drawn.params["seed"]).text == drawn.text
    finally:
        engine.close()


def test_stop_strings_end_the_answer(ask: Ask) -> None:
    result = ask("What is the capital of France?", stop=("France",)).result()
    assert (result.text, result.finish_reason) == ("The capital of ", "stop")


def test_max_tokens_cuts_and_says_so(ask: Ask) -> None:
    result = ask("Tell me a story about a dog.", max_tokens=5).result()
    assert (result.usage.completion_tokens, result.finish_reason) == (5, "length")


def test_a_full_context_ends_the_answer_with_length() -> None:
    engine = open_demo(context_size=256)
    try:
        tail = CompletionRequest(prompt="one two three " * 40)
        result = engine.submit(tail).result()
        used = result.usage.prompt_tokens + result.usage.completion_tokens
        assert used <= engine.info.context_size
        if result.finish_reason == "length":
            assert used == engine.info.context_size
    finally:
        engine.close()


def test_a_prompt_too_long_names_the_numbers_and_decodes_nothing(ask: Ask, engine: CompletionEngine) -> None:
    before = engine.load().prompt_tokens
    with pytest.raises(ContextOverflow) as caught:
        ask("word " * 3000)
    assert caught.value.context_size == 1024
    assert caught.value.prompt_tokens > 3000
    assert f"{caught.value.prompt_tokens:,}" in str(caught.value)
    assert engine.load().prompt_tokens == before


def test_cancel_keeps_what_there_is_and_the_engine_goes_on(ask: Ask) -> None:
    stream = ask("Tell me a story about a dog.")
    for event in stream:
        if isinstance(event, Delta):
            stream.cancel()
            break
    result = stream.result(timeout=5)
    assert result.finish_reason == "interrupted"
    assert "Once there was".startswith(result.text[:4])
    assert ask("What is 2 plus 3?").result().text == "2 plus 3 is 5."


def test_cancel_reaches_into_a_long_prompt(tmp_path: Path) -> None:
    engine = open_demo(batch_size=1024)
    try:
        stream = engine.submit(CompletionRequest(prompt="a b c d " * 120))
        stream.cancel()
        assert stream.result(timeout=5).finish_reason == "interrupted"
        assert engine.submit(CompletionRequest(prompt="Hello", max_tokens=3)).result(timeout=5)
    finally:
        engine.close()


def test_a_cell_typed_during_a_batch_is_served_before_the_batch_ends(engine: CompletionEngine) -> None:
    def story(priority: str, text: str, n: int) -> Any:
        return engine.submit(
            CompletionRequest(
                messages=({"role": "user", "content": text},),
                priority=priority,  # type: ignore[arg-type]
                max_tokens=n,
            ),
        )

    rows = [story("batch", f"Tell me a story about a {a}.", 60) for a in ("dog", "cat", "cow", "pig") * 15]
    cell = story("interactive", "What is 2 plus 3?", 20)
    assert cell.result(timeout=30).text == "2 plus 3 is 5."
    assert sum(r.done for r in rows) < len(rows)
    assert all(r.result(timeout=60).text for r in rows)


def test_choices_json_and_regex_are_obeyed(ask: Ask) -> None:
    def constrained(kind: Any, value: Any, prompt: str) -> str:
        return str(ask(prompt, constraint=Constraint(kind, value), max_tokens=60).result().text)

    assert constrained("choices", ("4", "5", "6"), "What is 2 plus 3?") in ("4", "5", "6")
    schema = {
        "type": "object",
        "properties": {"country": {"type": "string"}, "capital": {"enum": ["Paris", "Rome"]}},
        "required": ["country", "capital"],
        "additionalProperties": False,
    }
    answer = json.loads(constrained("json_schema", schema, "What is the capital of France? Answer in JSON."))
    assert answer["capital"] in ("Paris", "Rome")
    assert constrained("regex", "[0-9]{2}", "What is 2 plus 3?").isdigit()
    assert constrained("grammar", 'root ::= "yes" | "no"', "Hello!") in ("yes", "no")
    assert constrained("grammar", 'start: "a" "b"', "Hello!") == "ab"


def test_a_constrained_answer_that_is_cut_is_an_error_with_the_raw_text(ask: Ask) -> None:
    stream = ask("Hello!", constraint=Constraint("regex", "[a-z]{50}"), max_tokens=3)
    with pytest.raises(SchemaError, match="max_tokens") as caught:
        stream.result()
    assert caught.value.raw


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "[unclosed"),
        Constraint("json_schema", {"type": "no-such-type"}),
        Constraint("grammar", "start: undefined_rule"),
    ],
)
def test_a_bad_constraint_is_refused_before_anything_runs(ask: Ask, constraint: Constraint) -> None:
    with pytest.raises(RequestError):
        ask("Hello!", constraint=constraint)


def test_logprobs_are_log_probabilities(ask: Ask) -> None:
    result = ask("What is the capital of France?", logprobs=3).result()
    assert len(result.logprobs) == result.usage.completion_tokens
    for entry in result.logprobs:
        assert entry.logprob <= 0
        assert len(entry.top) == 3
        assert entry.top[0][1] == pytest.approx(entry.logprob, abs=1e-6)  # greedy: the chosen one is the top
        assert sum(np.exp(lp) for _, lp in entry.top) <= 1 + 1e-6
    assert "".join(e.token for e in result.logprobs) == result.text


def test_logit_bias_forbids_and_forces(ask: Ask, engine: CompletionEngine) -> None:
    token = int(engine._weights.tokenize(" Paris", special=False, add_special=False)[0])
    banned = ask("What is the capital of France?", sampling=Sampling(logit_bias={token: -100})).result()
    assert " P" not in banned.text
    with pytest.raises(RequestError, match="vocabulary"):
        ask("Hello!", sampling=Sampling(logit_bias={999_999: 1}))


def test_reasoning_is_apart_from_the_answer(ask: Ask) -> None:
    result = ask("What is 2 plus 3?", system="Think before you answer.").result()
    assert result.text == "2 plus 3 is 5."
    assert result.reasoning is not None
    assert "5" in result.reasoning


@pytest.mark.parametrize("budget", [0, 3])
def test_a_reasoning_budget_ends_the_thinking(ask: Ask, budget: int) -> None:
    result = ask("What is 2 plus 3?", system="Think before you answer.", reasoning_budget=budget).result()
    assert result.finish_reason == "stop"
    assert result.text
    assert len((result.reasoning or "").split()) <= budget + 1
    free = ask("What is 2 plus 3?", system="Think before you answer.", reasoning_budget=-1).result()
    assert len(free.reasoning.split()) > 5


def test_tool_calls_come_back_in_openai_shape(ask: Ask) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    result = ask("What is the weather in Paris?", tools=(tool,)).result()
    (call,) = result.tool_calls
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "get_weather",
        {"city": "Paris"},
    )
    assert result.text == ""


def test_scores_are_the_probabilities_of_generating_each_answer(engine: CompletionEngine, ask: Ask) -> None:
    messages = ({"role": "user", "content": "What is the capital of France?"},)
    said = ask("What is the capital of France?", logprobs=0).result()
    answers = (said.text, "The capital of France is Rome.", "Paris", "x")
    scored = engine.submit(ScoreRequest(answers=answers, messages=messages)).result(30)
    generated = sum(entry.logprob for entry in said.logprobs)
    assert scored.logprobs[0] == pytest.approx(generated, abs=0.05)  # the end of the turn is almost certain
    assert scored.probabilities().argmax() == 0
    assert scored.probabilities().sum() == pytest.approx(1)
    assert (scored.logprobs <= 0).all()


def test_a_label_is_chosen_without_generating(engine: CompletionEngine) -> None:
    system = {"role": "system", "content": "Answer with one word."}
    before = engine.load().tokens_generated
    for country, capital in [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo")]:
        messages = (system, {"role": "user", "content": f"What is the capital of {country}?"})
        request = ScoreRequest(answers=("Rome", "Paris", "Tokyo", "Oslo"), messages=messages)
        scored = engine.submit(request).result(30)
        assert request.answers[int(scored.logprobs.argmax())] == capital
        assert scored.probabilities().max() > 0.9
    assert engine.load().tokens_generated == before


def test_a_scoring_can_be_cancelled(engine: CompletionEngine) -> None:
    stream = engine.submit(ScoreRequest(answers=("a b c",) * 30, prompt="x y z " * 100))
    stream.cancel()
    with pytest.raises(EngineError, match="interrupted"):
        stream.result(10)
    assert engine.submit(CompletionRequest(prompt="Hello", max_tokens=2)).result(10)


def test_raw_prompts_skip_the_template(engine: CompletionEngine) -> None:
    prompt = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    request = CompletionRequest(prompt=prompt, max_tokens=20)
    result = engine.submit(request).result()
    assert result.text == "Hello! How can I help you?"
    assert engine.render(request) == (request.prompt, result.usage.prompt_tokens)


def test_wrong_kinds_of_request_are_refused(engine: CompletionEngine, ask: Ask) -> None:
    with pytest.raises(NotSupported, match="completion"):
        engine.submit(EmbeddingRequest(texts=["x"]))
    with pytest.raises(NotSupported, match="image"):
        ask("Hello!", images=(b"x",))


def test_closing_fails_what_runs_and_what_comes_later() -> None:
    engine = open_demo()
    streams = [engine.submit(CompletionRequest(prompt="a b c " * 50)) for _ in range(20)]
    engine.close()
    engine.close()
    outcomes = []
    for stream in streams:
        try:
            outcomes.append(stream.result(timeout=5))
        except EngineClosed as e:
            outcomes.append(e)
    assert any(isinstance(o, EngineClosed) for o in outcomes)
    with pytest.raises(EngineClosed):
        engine.submit(CompletionRequest(prompt="x"))


def test_no_thread_is_left_after_close() -> None:
    before = threading.active_count()
    open_demo().close()
    assert threading.active_count() == before


def test_a_file_that_is_no_model_is_refused_with_a_reason(tmp_path: Path) -> None:
    from nbinfer.engines.llamacpp import open_engine

    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelLoadError) as caught:
        open_engine(bad, mode=Mode.COMPLETION)
    assert "bad.gguf" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_a_thousand_mixed_requests_leave_nothing_behind() -> None:
    rng = random.Random(7)
    quiet = open_demo(parallel=1)
    noisy = open_demo(parallel=6)
    try:
        expected = {q: quiet.submit(_request(q)).result().text for q in QUESTIONS[:30]}
        resident: list[int] = []
        for _ in range(4):
            streams = [_submit_something(noisy, rng) for _ in range(250)]
            for question, kind, stream in streams:
                _check_outcome(kind, stream, expected[question])
            _settle(noisy)
            resident.append(psutil.Process().memory_info().rss)
        for slot in noisy._slots:
            assert slot.sequence is None
            top = noisy._context._lib.llama_memory_seq_pos_max(noisy._context.memory, slot.index)
            assert top == len(slot.held) - 1
        assert resident[-1] - resident[0] < 8 << 20
    finally:
        quiet.close()
        noisy.close()


def _submit_something(engine: CompletionEngine, rng: random.Random) -> tuple[str, str, Any]:
    """A question, a scoring, a request that is cancelled, or one that is refused."""
    question, kind = rng.choice(QUESTIONS[:30]), rng.choice(["plain", "plain", "cancel", "score", "bad"])
    request: Any = _request(question, rng.choice(["interactive", "batch"]))
    if kind == "score":
        request = ScoreRequest(answers=("Paris", "Rome", "blue"), messages=request.messages, priority="batch")
    elif kind == "bad":
        bias = Sampling(logit_bias={999_999: 1})
        with pytest.raises(RequestError):
            engine.submit(CompletionRequest(messages=request.messages, sampling=bias))
        return question, kind, None
    stream = engine.submit(request)
    if kind == "cancel":
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.003)
        stream.cancel()
    return question, kind, stream


def _check_outcome(kind: str, stream: Any, expected: str) -> None:
    result: Any = None if stream is None else stream.result(timeout=60)
    if kind == "plain":
        assert result.text == expected
    elif kind == "cancel":
        assert expected.startswith(result.text)
    elif kind == "score":
        assert result.probabilities().sum() == pytest.approx(1)


def _settle(engine: CompletionEngine) -> None:
    deadline = time.monotonic() + 5
    while engine.load().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.load().running, engine.load().waiting) == (0, 0)


def _request(question: str, priority: Any = "interactive", n: int = 40) -> CompletionRequest:
    messages = ({"role": "user", "content": question},)
    return CompletionRequest(messages=messages, priority=priority, max_tokens=n)


def test_more_text_than_the_context_holds_is_served_by_taking_turns() -> None:
    engine = open_demo(context_size=256, parallel=8)
    alone = open_demo(context_size=256, parallel=1)
    try:
        # Answers with one right continuation: a story has near ties, which a preempted row may tip.
        things = [
            "plot a sine wave",
            "read a CSV file",
            "reverse a string",
            "sort a list",
            "write a for loop",
        ]
        requests = [_request(f"Write Python code to {thing}.", "batch", 80) for thing in things * 2]
        expected = [alone.submit(r).result().text for r in requests]
        streams = [engine.submit(r) for r in requests]
        assert [s.result(timeout=60).text for s in streams] == expected
    finally:
        engine.close()
        alone.close()


def test_rows_that_fill_the_context_make_way_and_do_not_come_straight_back(
    engine: CompletionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What rows share is counted once, also where those that began together each hold it: the context may be
    # full although the count says that there is room.
    real, most = engine._context.decode, 0

    def room_for_three() -> int:
        nonlocal most
        running = sum(slot.sequence is not None for slot in engine._slots)
        most = max(most, running)
        if running > 3:
            engine._context.clear_batch()
            return NO_SPACE
        return real()

    monkeypatch.setattr(engine._context, "decode", room_for_three)
    constraint = Constraint("regex", "[a-z ]{60}")
    requests = [replace(_request(f"A story of {n}", "batch", 60), constraint=constraint) for n in range(12)]
    streams = [engine.submit(request) for request in requests]
    cell = engine.submit(_request("What is the capital of Peru?"))
    assert "Lima" in cell.result(timeout=20).text
    assert [len(stream.result(timeout=20).text) for stream in streams] == [60] * 12
    assert most > 3


def test_a_failed_decode_fails_its_requests_and_the_engine_goes_on(
    engine: CompletionEngine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine._context.decode

    def broken() -> int:
        engine._context.clear_batch()
        raise EngineError("llama.cpp failed while decoding: out of luck")

    monkeypatch.setattr(engine._context, "decode", broken)
    with pytest.raises(EngineError, match="out of luck"):
        ask("Hello!").result(10)
    monkeypatch.setattr(engine._context, "decode", real)
    assert ask("What is 2 plus 3?").result(10).text == "2 plus 3 is 5."
    assert engine.load().running == 0


def test_tokens_outside_the_vocabulary_are_refused(engine: CompletionEngine) -> None:
    with pytest.raises(RequestError, match="vocabulary"):
        engine.submit(CompletionRequest(prompt=(1, 2, 99_999)))


def test_errors_in_a_template_reach_the_caller(ask: Ask, engine: CompletionEngine) -> None:
    with pytest.raises(NbinferError):
        engine.submit(CompletionRequest(messages=({"role": "nobody", "content": "x"},)))
