"""Braces: two mean a value of the notebook, one is text, and nothing else is ever changed."""

from __future__ import annotations

import builtins
import dataclasses
import os
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.error import UsageError
from pydantic import BaseModel

from nbinfer.contract.results import Result
from nbinfer.magics.template import TABLE_ROWS, as_text, expand, names_of

PROMPTS = [
    '{"a": {"b": [1, 2]}}',
    'fn main() { println!("{}", x); }',
    "f'{x!r:>{width}}'",
    r"\frac{1}{2} $x_{i}$ {% raw %} {# note #}",
    "$HOME ${HOME} %(x)s {0} {name}",
    "a } } { { b",
    "tabs\tand\r\nline ends\n\n",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_code_json_and_latex_are_unchanged(text: str) -> None:
    assert expand(text, {"x": "WRONG", "name": "WRONG"}) == text


@given(st.text().filter(lambda text: "{{" not in text))
def test_any_text_without_double_braces_is_unchanged(text: str) -> None:
    assert expand(text, {}) == text


class Book(BaseModel):
    title: str


@dataclasses.dataclass
class Point:
    x: int
    y: int


NAMES: dict[str, Any] = {
    "name": "Ada",
    "n": 3,
    "d": {"k": [1, "é"], "b": {"c": 1}},
    "book": Book(title="Emma"),
    "point": Point(1, 2),
    "words": ["a", "b"],
    "braces": "{{ name }}",
    "answer": Result(text="42"),
    "path": Path("some/file.txt"),
    "none": None,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dear {{ name }}!", "Dear Ada!"),
        ("{{name}}{{ n + 1 }}", "Ada4"),
        ("{{ name.upper() }}", "ADA"),
        ("{{ d.k[0] }} {{ d['k'] | length }} {{ len(d) }}", "1 2 2"),
        ('{{ words | join(", ") }}', "a, b"),
        ("{{ 'yes' if n > 2 else 'no' }}", "yes"),
        ("{{ braces }}", "{{ name }}"),
        ('{{ "{{" }} and {{ "}}" }}', "{{ and }}"),
        ('{{ {"a": {"b": n}}.a.b }}', "3"),
        ('{"q": "{{ name }}"}', '{"q": "Ada"}'),
        ('{{ {"a": {"b": 1}}}}', '{\n  "a": {\n    "b": 1\n  }\n}'),
        ("{{\n  name\n}}", "Ada"),
        ("{{ answer }}", "42"),
        ("{{ path }}", "some/file.txt"),
        ("{{ none }}", "None"),
        ("{{ sum([1, n]) }}", "4"),
        (r"\alpha {{n}} v{{n}} file_{{ n }} ${{n}} a\n{{n}}", r"\alpha 3 v3 file_3 $3 a\n3"),
    ],
)
def test_expressions_are_replaced_once(text: str, expected: str) -> None:
    assert expand(text, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{{ nmae }}", ["'nmae'", "Did you mean name", "--raw"]),
        ("one\ntwo {{ a b }}", ["{{ a b }}", "line 2", "--raw"]),
        ("{{ never closed", ["never closed", "--raw"]),
        ("{{}}", ["nothing in it"]),
        ("{{ d.zz.y }}", ["zz"]),
        ("{{ n.zz }}", ["zz"]),
        ("{{ 1 / 0 }}", ["ZeroDivisionError"]),
        ("{{ name | nofilter }}", ["nofilter"]),
        ("{{ 'no/such/file' | read }}", ["no/such/file", "No such file"]),
        ("{{ n | read }}", ["takes a path", "int"]),
        (r"\frac{{a}}{{b}}", ["{{a}}", r"\frac", "--raw"]),
        ("so\n\\mathbf{{n}}", ["{{n}} on line 2", r"\mathbf", "--raw", "space"]),
        (r"\sqrt[3]{{n}}", ["{{n}}", r"\sqrt[3]", "--raw"]),
        (r"\frac{1}{{ n }}", ["{{ n }}", r"\frac{1}", "--raw"]),
        ("x_{{n}}", ["{{n}}", "after _", "--raw"]),
        ("e^{{n}}", ["{{n}}", "after ^", "--raw"]),
        ("{{ open('x') }}", ["'open'"]),
        ("{{ __import__('os') }}", ["__import__"]),
        ("{{ name.__class__.__mro__ }}", ["unsafe"]),
        ("{{ words.append(1) }}", ["unsafe"]),
    ],
)
def test_what_cannot_be_replaced_is_a_short_error(text: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        expand(text, NAMES)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.count("\n") < 4


FROM_OUTSIDE = {"df": pd.DataFrame({"a": [1, 2]}), "os": os, "pd": pd, "Text": type("Text", (str,), {})}


@pytest.mark.parametrize(
    ("expression", "attribute"),
    [
        ("os.getcwd()", "getcwd"),
        ("os['getcwd']()", "getcwd"),
        ("(os | attr('getcwd'))()", "getcwd"),
        ("([os] | map(attribute='getcwd') | first)()", "getcwd"),
        ("pd.io.common.os.getcwd()", "io"),
        ("df.eval('@sys.path', level=0)", "eval"),
        ("df.query('@builtins.open', level=5)", "query"),
        ("str.format('{0.__class__}', 1)", "format"),
        ("Text.format_map('{x.__class__}', {'x': 1})", "format_map"),
        ("'{0.__class__}'.format(df)", "__class__"),
        ("type(df).__subclasses__()", "__subclasses__"),
        ("(df | attr('__class__'))", "__class__"),
    ],
)
def test_an_expression_reaches_no_module_and_no_inside_of_python(expression: str, attribute: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand("{{ " + expression + " }}", FROM_OUTSIDE)
    message = str(caught.value)
    assert attribute in message
    assert "unsafe" in message
    assert "in a cell of its own" in message


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("df.head(1)", "| a |\n| --- |\n| 1 |"),
        ("df[df.a > 1].a.sum()", "2"),
        ("df['a'].mean()", "1.5"),
        ("'%s' % df.a.max()", "2"),
        ("'{}, {x}'.format(1, x=2)", "1, 2"),
        ("', '.join(['a', 'b'])", "a, b"),
        ("Text('x').upper()", "X"),
    ],
)
def test_what_the_notebooks_own_values_can_do_stays(expression: str, text: str) -> None:
    assert expand("{{ " + expression + " }}", FROM_OUTSIDE) == text


def test_names_are_the_notebooks_not_the_shells() -> None:
    shells = {"get_ipython": print, "open": open, "exit": 1, "quit": 2, "_dh": [], "In": [], "Out": {}}
    names = names_of({**shells, "__builtins__": builtins, "__name__": "__main__", "x": 1, "__": 2}, shells)
    assert names.keys() - {"last_error"} == {"In", "Out", "x", "__"}
    # A variable of the person's own may be called so.
    assert names_of({**shells, "open": 9.5}, shells)["open"] == 9.5


def test_an_expression_changes_nothing() -> None:
    words = ["a"]
    with pytest.raises(UsageError):
        expand("{{ words.append('b') }}", {"words": words})
    assert words == ["a"]


def test_files_are_read_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("héllo {{ x }}", encoding="utf-8")
    assert expand("{{ p | read }}", {"p": path}) == "héllo {{ x }}"
    assert expand("{{ p }}", {"p": path}) == str(path)


FRAME = {"a": [1, 2], "b": ["x|y", "two\nlines"]}
TABLE = "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 | two lines |"


@pytest.mark.parametrize(
    "frame", [pd.DataFrame(FRAME), pl.DataFrame(FRAME), pa.table(FRAME)], ids=["pd", "pl", "pa"]
)
def test_frames_are_markdown_tables(frame: Any) -> None:
    assert as_text(frame) == TABLE


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pd.Series([1, 2]), "| value |\n| --- |\n| 1 |\n| 2 |"),
        (pl.Series("s", [1]), "| s |\n| --- |\n| 1 |"),
        (pd.Series({"x": 1}, name="count"), "| index | count |\n| --- | --- |\n| x | 1 |"),
        (pd.DataFrame({"a": [None, 1.5]}), "| a |\n| --- |\n|  |\n| 1.5 |"),
        (
            pd.DataFrame({"t": [pd.NaT], "i": pd.array([None], dtype="Int64")}),
            "| t | i |\n| --- | --- |\n|  |  |",
        ),
    ],
)
def test_labels_stay_and_missing_values_are_empty(value: Any, text: str) -> None:
    assert as_text(value) == text


def test_a_long_table_is_capped_and_says_so() -> None:
    text = as_text(pd.DataFrame({"a": range(TABLE_ROWS + 1234)}))
    assert text.endswith("… 1,234 more rows")
    assert text.count("\n") == TABLE_ROWS + 2


def test_structures_are_json() -> None:
    assert as_text({"k": [1, "é"], "p": Point(1, 2), "b": Book(title="Emma")}) == (
        '{\n  "k": [\n    1,\n    "é"\n  ],\n  "p": {\n    "x": 1,\n    "y": 2\n  },\n'
        '  "b": {\n    "title": "Emma"\n  }\n}'
    )
    assert as_text(Point(1, 2)) == '{\n  "x": 1,\n  "y": 2\n}'
    assert as_text({(1, 2): 3}) == "{(1, 2): 3}"


def test_errors_are_traces_and_functions_their_source() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("odd")
    text = as_text(caught.value)
    assert text.startswith("Traceback")
    assert text.endswith("ValueError: invalid literal for int() with base 10: 'odd'")
    assert as_text(test_errors_are_traces_and_functions_their_source).startswith("def test_errors")
    assert as_text(len) == "<built-in function len>"
