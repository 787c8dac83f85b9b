"""Templates know their columns before a row is read, and no missing value becomes the text "nan"."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pytest

from nbinfer.contract.errors import RequestError
from nbinfer.frames.prompts import Call, Column, Jinja, Template, as_content, make_prompt

COLUMNS = ["title", "body", "first name", "a.b", "price"]


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("{title}", {"title": "A"}, "A"),
        ("T: {title}\nB: {body}", {"title": "A", "body": "B"}, "T: A\nB: B"),
        ("{title} {title}", {"title": "A"}, "A A"),
        ("{first name}", {"first name": "Ada"}, "Ada"),
        ("{a.b}", {"a.b": "dot"}, "dot"),
        ("{price:.2f}", {"price": 1.5}, "1.50"),
        ("{price:>6}|", {"price": 12}, "    12|"),
        ("{title!r}", {"title": "A"}, "'A'"),
        ('{{"json": {title}}}', {"title": 1}, '{"json": 1}'),
        ("{title}", {"title": "{body}"}, "{body}"),
        ("{title}", {"title": date(2024, 2, 29)}, "2024-02-29"),
        ("{title}", {"title": True}, "True"),
    ],
)
def test_a_template_fills_its_fields(template: str, values: dict[str, Any], text: str) -> None:
    made = Template(template, COLUMNS)
    assert made.render([values[c] for c in made.columns]) == text


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("no field", "no field"),
        ("{{title}}", "no field"),
        ("", "no field"),
        ("{titel}", "Did you mean 'title'"),
        ("{nothing}", "Columns: 'title', 'body'"),
        ('{"a": 1}: {title}', "doubled"),
        ("{}", "no column"),
        ("{0}", "no column"),
        ("{title.__class__}", "no column"),
        ("{title[0]}", "no column"),
        ("{title", "does not parse"),
        ("title}", "does not parse"),
        ("{price:{body}}", "in its format"),
    ],
)
def test_a_wrong_template_says_what_is_possible(template: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        Template(template, COLUMNS)
    assert str(caught.value).count("\n") < 5


def test_the_only_column_of_a_list_goes_by_text_or_nothing() -> None:
    for template in ("say {text}", "say {}", "say {review}"):
        assert Template(template, ["review"], only=True).render(["hi"]) == "say hi"
    with pytest.raises(RequestError, match="'review'"):
        Template("say {other}", ["review"], only=True)


def test_bytes_in_a_template_are_refused_instead_of_printed() -> None:
    with pytest.raises(RequestError, match="holds bytes"):
        Template("{title}", COLUMNS).render([b"raw"])


@pytest.mark.parametrize(
    ("template", "advised"),
    [
        ("{title}" + "x" * 200, True),
        ("x" * 200 + "{title}", False),
        ("{title}: one line", False),
        ("x" * 300 + "{title}" + "y" * 250, False),
        ("{title}" + "x" * 100 + "{body}" + "y" * 100, True),
    ],
)
def test_fixed_text_after_the_first_field_is_advised_against(template: str, advised: bool) -> None:
    assert (Template(template, COLUMNS).advice is not None) is advised


CONVERSATION = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        (np.str_("text"), "text"),
        (3, "3"),
        (CONVERSATION, tuple(CONVERSATION)),
        (tuple(CONVERSATION), tuple(CONVERSATION)),
        (np.array(CONVERSATION, dtype=object), tuple(CONVERSATION)),
        ([{"role": "user", "content": "hi", "name": None}], tuple(CONVERSATION)),
    ],
)
def test_a_cell_is_text_or_a_conversation(value: Any, content: Any) -> None:
    assert as_content(value) == content
    assert type(as_content(value)) is type(content)


@pytest.mark.parametrize(
    "value", [b"x", bytearray(b"x"), {"a": 1}, {1}, [], ["text"], [{"role": "robot"}], [1]]
)
def test_a_cell_that_is_neither_is_refused(value: Any) -> None:
    with pytest.raises(RequestError):
        as_content(value)


def test_a_callable_gets_the_row_and_may_skip_it() -> None:
    call = make_prompt(lambda row: row["title"].upper() if row["body"] else None, None, COLUMNS, only=False)
    assert isinstance(call, Call)
    assert call.render(["a", "b", "", "", 0]) == "A"
    assert call.render(["a", None, "", "", 0]) is None
    only = make_prompt(str.upper, None, ["text"], only=True)
    assert only.render(["a"]) == "A"


def test_jinja_knows_its_columns_and_cannot_reach_python() -> None:
    made = make_prompt(Jinja("{% for x in body %}{{ x }};{% endfor %}{{ title }}"), None, COLUMNS, only=False)
    assert made.columns == ("body", "title")
    assert made.render([["a", "b"], "T"]) == "a;b;T"
    with pytest.raises(RequestError, match="names 'missing'"):
        make_prompt(Jinja("{{ missing }}"), None, COLUMNS, only=False)
    with pytest.raises(RequestError, match="no variable"):
        make_prompt(Jinja("fixed"), None, COLUMNS, only=False)
    with pytest.raises(RequestError, match="does not parse"):
        Jinja("{% for %}")
    escape = make_prompt(Jinja("{{ title.__class__.__mro__ }}"), None, COLUMNS, only=False)
    with pytest.raises(Exception, match=r"unsafe|undefined|__class__"):
        escape.render(["T"])


@pytest.mark.parametrize(
    ("prompt", "on", "says"),
    [
        (None, None, "which column"),
        ("{title}", "body", "not both"),
        (None, "titel", "Did you mean 'title'"),
        (7, None, "prompt is int"),
    ],
)
def test_a_call_that_names_no_prompt_is_refused(prompt: Any, on: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        make_prompt(prompt, on, COLUMNS, only=False)


def test_on_takes_the_column_as_it_is() -> None:
    made = make_prompt(None, "body", COLUMNS, only=False)
    assert isinstance(made, Column)
    assert made.render(["{title} {"]) == "{title} {"


class Bare:
    pass


class Picture:
    def _repr_png_(self) -> bytes:
        return b"png"


class Spoken:
    def __str__(self) -> str:
        return "spoken"


@pytest.mark.parametrize("value", [Bare(), Picture(), np.zeros((2, 2))], ids=["object", "picture", "matrix"])
def test_a_value_that_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=r"column 'x' holds .*images='column'"):
        Template("a {x}", ["x"]).render([value])
    with pytest.raises(RequestError, match="a row holds"):
        as_content(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (True, "True"),
        (2.5, "2.5"),
        (Decimal("1.50"), "1.50"),
        (date(2024, 2, 29), "2024-02-29"),
        (["a", 1], "['a', 1]"),
        ({"a": 1}, "{'a': 1}"),
        (np.float32(0.5), "0.5"),
        (np.array([1, 2]), "[1 2]"),
        (pd.Timestamp("2024-02-29"), "2024-02-29 00:00:00"),
        (pd.Timedelta("1h"), "0 days 01:00:00"),
        (Path("a"), "a"),
        (Spoken(), "spoken"),
        (UUID(int=0), str(UUID(int=0))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_with_a_text_of_its_own_is_that_text(value: Any, text: str) -> None:
    assert Template("{x}", ["x"]).render([value]) == text
