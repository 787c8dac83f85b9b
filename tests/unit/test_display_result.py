"""A result says what the model said, how it ended and what it cost; in every view, inert."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest
from pydantic import BaseModel
from support.hostile import CORPUS, problems

from nbinfer.contract.results import Result, Timings, Usage
from nbinfer.display import mimebundle
from nbinfer.display.result import VIEWS, View, result_bundle, summary
from nbinfer.display.style import STYLE


def answer(text: str = "Hello **you**", **fields: Any) -> Result:
    usage = Usage(prompt_tokens=9, completion_tokens=212)
    timings = Timings(generation_seconds=2.0, generated_tokens=212)
    return Result(**{"text": text, "usage": usage, "timings": timings, "model": "demo", **fields})


def html_of(result: Result, **options: Any) -> str:
    return str(result_bundle(result, **options)[0]["text/html"])


def text_of(result: Result, **options: Any) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", html_of(result, **options).removeprefix(STYLE)))


def test_an_answer_is_html_and_plain_text_and_never_markdown() -> None:
    data, metadata = mimebundle(answer())
    assert set(data) == {"text/plain", "text/html"}
    assert data["text/plain"] == "Hello **you**"
    assert "Hello <strong>you</strong>" in data["text/html"]
    assert metadata["nbinfer"]["model"] == "demo"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("finish", ["stop", "length", "interrupted", "error"])
def test_no_view_is_markdown(view: View, running: bool, finish: Any) -> None:
    data, _ = result_bundle(answer('{"a": 1}', finish_reason=finish), view=view, running=running)
    assert "text/markdown" not in data
    assert data["text/plain"]


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
@pytest.mark.parametrize("view", ["rich", "code"])
def test_hostile_text_is_inert_wherever_it_stands(text: str, view: View) -> None:
    # As the answer, reasoning, error, model name, typed values and their names, tool calls.
    parsed = [{"a": text, text: 1}]
    for result in (
        answer(
            text, reasoning=text, error=text, finish_reason="error", model=text, tool_calls=({"name": text},)
        ),
        answer(text, parsed=parsed),
        answer(text, parsed={"a": text, text: text}),
        answer(text, parsed={"deep": [text, {text: text}]}),
    ):
        for running in (False, True):
            page = html_of(result, view=view, running=running)
            assert problems(page, style=STYLE) == []
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", result_bundle(result)[0]["text/plain"])


def test_the_footer_names_model_tokens_speed_and_end() -> None:
    assert summary(answer()) == "demo · 212 tokens · 106 tok/s · stop"
    assert "demo · 212 tokens · 106 tok/s · stop" in text_of(answer())
    assert "tok/s" not in text_of(answer(), footer=False)


def test_metadata_is_plain_json_that_a_notebook_can_keep() -> None:
    _, metadata = result_bundle(answer(params={"seed": 7, "temperature": 0.5}, finish_reason="length"))
    kept = json.loads(json.dumps(metadata))["nbinfer"]
    assert (kept["seed"], kept["temperature"], kept["finish_reason"]) == (7, 0.5, "length")
    assert (kept["prompt_tokens"], kept["completion_tokens"]) == (9, 212)


@pytest.mark.parametrize(
    ("finish", "error", "words"),
    [
        ("interrupted", None, "interrupted"),
        ("length", None, "max_tokens"),
        ("error", "out of <memory>", "failed: out of <memory>"),
    ],
)
def test_an_answer_that_is_not_whole_says_so_in_both_forms(
    finish: Any, error: str | None, words: str
) -> None:
    result = answer(finish_reason=finish, error=error)
    assert words in text_of(result)
    assert words in result_bundle(result)[0]["text/plain"]
    assert "Hello" in text_of(result)


def test_reasoning_is_folded_and_open_only_while_it_is_all_there_is() -> None:
    thinking = answer("", reasoning="let me *see*")
    assert "<details open><summary>Reasoning (3 words)" in html_of(thinking, running=True)
    assert "<details><summary>" in html_of(answer(reasoning="let me *see*"), running=True)
    assert "<details><summary>" in html_of(answer(reasoning="let me *see*"))
    assert "let me" not in result_bundle(answer(reasoning="let me *see*"))[0]["text/plain"]


class Person(BaseModel):
    name: str
    age: int | None


@dataclass
class Point:
    x: int
    y: int


@pytest.mark.parametrize(
    ("parsed", "shown"),
    [
        (
            Person(name="<Ada>", age=None),
            "<tr><th>name</th><td>&lt;Ada&gt;</td></tr><tr><th>age</th><td></td></tr>",
        ),
        (Point(1, 2), "<tr><th>x</th><td>1</td></tr><tr><th>y</th><td>2</td></tr>"),
        ([Point(1, 2), Point(3, 4)], "<tr><th>x</th><th>y</th></tr><tr><td>1</td><td>2</td></tr>"),
        ([{"a": 1}, {"b": 2}], "<tr><th>a</th><th>b</th></tr><tr><td>1</td><td></td></tr>"),
    ],
)
def test_flat_values_are_tables(parsed: Any, shown: str) -> None:
    assert shown in html_of(answer(parsed=parsed))


@pytest.mark.parametrize("parsed", [{"a": {"b": [1]}}, [1, 2], [], {}, 3])
def test_other_values_are_json(parsed: Any) -> None:
    page = html_of(answer(parsed=parsed))
    assert "<table>" not in page
    block = re.search("<pre><code>(.*?)</code></pre>", page, re.DOTALL)
    assert block
    assert json.loads(html.unescape(re.sub("<[^>]*>", "", block[1]))) == parsed


def test_a_long_table_says_how_much_more_there_is() -> None:
    page = html_of(answer(parsed=[{"a": i} for i in range(130)]))
    assert "… 30 more rows" in page
    assert page.count("<tr>") == 101


def test_the_code_view_is_the_first_block_alone() -> None:
    result = answer("Here:\n```python\nx = 1\n```\nand\n```\ny\n```")
    data, _ = result_bundle(result, view="code")
    assert data["text/plain"] == "x = 1"
    assert "Here" not in data["text/html"]
    assert '<span class="nbinfer-m">1</span>' in data["text/html"]


def test_the_text_view_is_text_only() -> None:
    assert result_bundle(answer(), view="text")[0] == {"text/plain": "Hello **you**"}


def test_the_json_view_is_the_value() -> None:
    data, _ = result_bundle(answer('{"b": [1, "é"]}'), view="json")
    assert data["application/json"] == {"b": [1, "é"]}
    assert json.loads(data["text/plain"]) == {"b": [1, "é"]}
    typed, _ = result_bundle(answer("ignored", parsed=Person(name="Ada", age=3)), view="json")
    assert typed["application/json"] == {"name": "Ada", "age": 3}


@pytest.mark.parametrize("running", [True, False])
def test_the_json_view_of_what_is_no_json_is_the_text(running: bool) -> None:
    data, _ = result_bundle(answer('{"b": '), view="json", running=running)
    assert "application/json" not in data
    assert data["text/plain"] == '{"b": '


class _Frames(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.frames: list[dict[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "iframe":
            self.frames.append(dict(attrs))


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
def test_the_html_view_is_one_closed_frame(text: str) -> None:
    outer = _Frames()
    outer.feed(html_of(answer(text), view="html"))
    assert outer.tags == ["style", "div", "iframe", "div"]
    (frame,) = outer.frames
    # An empty sandbox: no script, no form, no top-level navigation, its own origin.
    assert frame["sandbox"] == ""
    source = frame["srcdoc"] or ""
    assert source.startswith('<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; ')
    inner = _Frames()
    inner.feed(source)
    assert inner.tags[0] == "meta"
    assert not {"meta", "link", "base"} & set(inner.tags[1:])


def test_other_values_have_a_bundle_too() -> None:
    assert mimebundle("x\x1b[1m") == ({"text/plain": "x\u241b[1m"}, {})
    assert "<td>&lt;a&gt;</td>" in mimebundle([{"name": "<a>"}])[0]["text/html"]
    assert "<td>&lt;a&gt;</td>" in mimebundle(pd.DataFrame({"name": ["<a>"]}))[0]["text/html"]
