"""Results, errors, and the seam to rendering."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from typing import Any

import numpy as np
import pytest

from nbinfer.contract import errors, rendering
from nbinfer.contract.errors import ContextOverflow, GGUFParseError, NbinferError, RequestError, SchemaError
from nbinfer.contract.results import Result, ScoreResult, Timings, TokenLogprob, Usage


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", None),
        ("no code", None),
        ("`inline`", None),
        ("``\nx\n``", None),
        ("```x``` is inline code\nand text", None),
        ("text ```\nx\n```", None),
        ("    ```\nx\n    ```", None),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\ny = 2\n```", "x = 1\ny = 2"),
        ("```python title='a'\nx\n```", "x"),
        ("Here:\n\n```\nx\n```\n\nthen\n\n```\ny\n```", "x"),
        ("```\n```", ""),
        ("```\n\n```", ""),
        ("```\nx", "x"),
        ("```\nx\n``", "x\n``"),
        ("~~~\nx\n~~~", "x"),
        ("~~~\n```\nx\n```\n~~~", "```\nx\n```"),
        ("~~~ `a`\nx\n~~~", "x"),
        ("````\n```\nx\n```\n````", "```\nx\n```"),
        ("```\nx\n`````", "x"),
        ("```\nx\n~~~\ny\n```", "x\n~~~\ny"),
        ("   ```\n   x\n   ```", "   x"),
        ("```\nx\n```  ", "x"),
        ("```python\r\nx\r\n```\r\n", "x\r"),
        ("```\nx\n``` not a close\n```", "x\n``` not a close"),
        ("```\n  indented\n\n  more\n```", "  indented\n\n  more"),
    ],
)
def test_code_is_the_first_fenced_block(text: str, code: str | None) -> None:
    assert Result(text=text).code == code


def test_finding_code_takes_linear_time() -> None:
    # A pattern that backtracks would not come back from this within the time limit of a test.
    for hostile in ("```\n" + "`` \n" * 100_000, "```" * 100_000, "~~~\n" * 100_001, "\n   " * 200_000):
        Result(text=hostile).code  # noqa: B018 - that it returns is the point


def test_a_result_reads_as_its_text() -> None:
    assert str(Result(text="hello", reasoning="hm")) == "hello"


def test_reply_continues_the_conversation() -> None:
    calls: list[dict[str, Any]] = []

    def answer(**options: Any) -> Result:
        calls.append(options)
        return Result(text="second")

    first = Result(text="first", messages=({"role": "user", "content": "q"},), continue_with=answer)
    assert first.reply("more", temperature=1).text == "second"
    assert calls == [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "first"},
                {"role": "user", "content": "more"},
            ],
            "temperature": 1,
        }
    ]


@pytest.mark.parametrize(
    "result",
    [
        Result(text="x"),
        Result(text="x", messages=()),
        Result(text="x", continue_with=lambda **_: Result(text="")),
    ],
)
def test_only_a_conversation_can_be_continued(result: Result) -> None:
    with pytest.raises(RequestError, match="not part of a conversation"):
        result.reply("more")


def test_a_result_is_copied_with_changes_and_never_changed() -> None:
    result = Result(text="x", usage=Usage(prompt_tokens=3))
    assert result.with_changes(parsed=5).parsed == 5
    assert result.parsed is None
    with pytest.raises(AttributeError):
        result.text = "y"  # type: ignore[misc]


def test_to_dict_is_json() -> None:
    result = Result(
        text="x",
        reasoning="r",
        parsed={"a": 1},
        usage=Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=1),
        timings=Timings(prompt_seconds=0.5),
        logprobs=(TokenLogprob("x", -0.5, (("x", -0.5), ("y", -1.5))),),
        messages=({"role": "user", "content": "q"},),
        params={"seed": 1},
        continue_with=lambda **_: Result(text=""),
    )
    decoded = json.loads(json.dumps(result.to_dict()))
    assert "continue_with" not in decoded
    assert decoded["usage"] == dataclasses.asdict(result.usage)
    assert decoded["timings"]["prompt_seconds"] == 0.5
    assert decoded["logprobs"] == [{"token": "x", "logprob": -0.5, "top": [["x", -0.5], ["y", -1.5]]}]
    assert decoded["text"] == "x"
    assert Result(text="").to_dict()["logprobs"] is None


@pytest.mark.parametrize(
    ("timings", "prompt_rate", "rate"),
    [
        (Timings(), None, None),
        (Timings(prompt_tokens=10, prompt_seconds=2), 5, None),
        # n tokens take n - 1 steps after the prompt: the first comes with it.
        (Timings(generated_tokens=11, generation_seconds=2), None, 5),
        (Timings(generated_tokens=1, generation_seconds=2), None, None),
        (Timings(generated_tokens=5, generation_seconds=0), None, None),
        (Timings(prompt_tokens=0, prompt_seconds=1), 0, None),
    ],
)
def test_rates_are_tokens_over_seconds_or_unknown(
    timings: Timings, prompt_rate: float | None, rate: float | None
) -> None:
    assert timings.prompt_tokens_per_second == prompt_rate
    assert timings.tokens_per_second == rate


@pytest.mark.parametrize(
    ("logprobs", "shares"),
    [
        ([0.0], [1.0]),
        ([-1.0, -1.0], [0.5, 0.5]),
        ([-2000.0, -2000.0 - np.log(3)], [0.75, 0.25]),
        ([0.0, -np.inf], [1.0, 0.0]),
    ],
)
def test_scores_become_shares_that_sum_to_one(logprobs: list[float], shares: list[float]) -> None:
    np.testing.assert_allclose(ScoreResult(logprobs=np.array(logprobs)).probabilities(), shares, atol=1e-12)


@pytest.fixture
def no_renderer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_renderer", None)


@pytest.mark.usefixtures("no_renderer")
def test_without_a_renderer_a_value_is_plain_text() -> None:
    assert Result(text="<b>x</b>")._repr_mimebundle_() == ({"text/plain": "<b>x</b>"}, {})


@pytest.mark.usefixtures("no_renderer")
def test_the_registered_renderer_draws_values() -> None:
    rendering.register(lambda value: ({"text/html": value.text.upper()}, {"a": 1}))
    assert Result(text="x")._repr_mimebundle_(include=None, exclude=None) == ({"text/html": "X"}, {"a": 1})


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, NbinferError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_ours_and_also_the_one_a_python_programmer_expects(kind: type[NbinferError]) -> None:
    assert kind is NbinferError or any(
        issubclass(kind, builtin)
        for builtin in (ValueError, RuntimeError, LookupError, MemoryError, NotImplementedError)
    )


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_keep_their_message_across_processes(kind: type[NbinferError]) -> None:
    error = kind("what went wrong")
    # As the errors of Dask's workers are unpickled, before their attributes are put in.
    assert type(kind.__new__(kind, *error.args)) is kind
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own bytes
        assert type(other) is kind
        assert str(other) == str(error)
        assert "what went wrong" in str(error)


def test_errors_keep_their_facts_across_processes() -> None:
    overflow = pickle.loads(pickle.dumps(ContextOverflow("too long", prompt_tokens=9, context_size=8)))  # noqa: S301
    assert (overflow.prompt_tokens, overflow.context_size) == (9, 8)
    assert pickle.loads(pickle.dumps(SchemaError("bad", raw="{"))).raw == "{"  # noqa: S301
    parse = pickle.loads(pickle.dumps(GGUFParseError("no magic")))  # noqa: S301
    assert (str(parse), parse.problem) == ("failed to parse GGUF: no magic", "no magic")
