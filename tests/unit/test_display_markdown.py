"""What a model writes is shown, and cannot do anything."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import CORPUS, problems

from nbinfer.display.code import code_block, highlight
from nbinfer.display.markdown import render
from nbinfer.display.text import printable


def visible(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
def test_hostile_text_is_inert(text: str) -> None:
    assert problems(render(text)) == []


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
def test_hostile_text_is_inert_at_every_moment_of_a_stream(text: str) -> None:
    for end in range(0, min(len(text), 150), 3):
        assert problems(render(text[:end])) == []


def test_the_reader_of_the_corpus_would_notice() -> None:
    # Rendered as a front end renders Markdown, most of the corpus is found guilty.
    from markdown_it import MarkdownIt

    careless = MarkdownIt("commonmark", {"html": True})
    careless.validateLink = lambda url: True  # type: ignore[method-assign]
    guilty = [name for name, text in CORPUS.items() if problems(careless.render(text))]
    assert len(guilty) > 0.8 * len(CORPUS)


MARKUP = st.lists(
    st.sampled_from(
        [
            *"<>\"'&`*_[]()!#|\\$:-=\n \t~",
            "](",
            "![",
            "<a ",
            "</",
            "javascript:",
            "https://x",
            "```",
            "$$",
            "\\[",
        ]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)


@given(MARKUP)
def test_any_text_is_inert(text: str) -> None:
    assert problems(render(text)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**bold** and *soft*", "<strong>bold</strong> and <em>soft</em>"),
        ("~~gone~~", "<s>gone</s>"),
        ("# Title", "<h1>Title</h1>"),
        ("- a\n- b", "<li>a</li>\n<li>b</li>"),
        ("|a|b|\n|-|-:|\n|1|2|", '<td style="text-align:right">2</td>'),
        ("[site](https://ok.example/a?b=1&c=2)", 'href="https://ok.example/a?b=1&amp;c=2"'),
        ("<me@ok.example>", 'href="mailto:me@ok.example"'),
        ("![a cat](https://ok.example/cat.png)", "[image: a cat]</a> (ok.example)"),
        ("`a < b`", "<code>a &lt; b</code>"),
    ],
)
def test_markdown_is_rendered(text: str, expected: str) -> None:
    assert expected in render(text)


def test_links_open_elsewhere_and_say_nothing_of_here() -> None:
    link = re.search("<a [^>]*>", render("[x](https://ok.example)"))
    assert link
    assert 'target="_blank" rel="noopener noreferrer nofollow"' in link[0]


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("so $a<b$ holds", "$a<b$"),
        ("$$\n\\frac{1}{2}\n$$", "$$\n\\frac{1}{2}\n$$"),
        ("the square \\(x^2\\) is", "$x^2$"),
        ("in the middle \\[x\\] of a line", "$$x$$"),
        ("after text:\n\\[\na &= b \\\\\n- c\n\\]\nmore", "$$\na &= b \\\\\n- c\n$$"),
        ("after text:\n$$\na\n= b\n$$\nmore", "$$\na\n= b\n$$"),
        ("> \\[\n> q\n> \\]", "$$\nq\n$$"),
        ("- item\n\n  $$\n  y\n  $$", "$$\ny\n$$"),
    ],
)
def test_math_reaches_mathjax_as_it_was_written(text: str, formula: str) -> None:
    shown = re.findall('<span class="tex2jax_process mathjax_process">(.*?)</span>', render(text), re.DOTALL)
    assert [re.sub(r"(?m)^ +", "", html.unescape(f)) for f in shown] == [formula]


@pytest.mark.parametrize(
    "text", ["it costs $5 and $10", "\\(never closed", "a $ b $ c", "`$x$`", "$\\href{x}{y}$"]
)
def test_what_is_no_math_is_not_typeset(text: str) -> None:
    assert "mathjax_process" not in render(text)


CODE = 'def f(x: int) -> str:\n\treturn f"{x!r} <b>"  # é & ü\n\n\n'


@pytest.mark.parametrize("language", ["python", "rust", "html", "json", "text", "no-such-language", ""])
def test_code_is_shown_to_the_character(language: str) -> None:
    assert visible(code_block(CODE, language)) == CODE
    assert visible(render(f"```{language}\n{CODE}```")).strip("\n") == CODE.strip("\n")


def test_known_languages_are_coloured_by_theme_classes() -> None:
    assert '<span class="nbinfer-k">def</span>' in highlight(CODE, "python")
    assert "style=" not in highlight(CODE, "python")


@given(st.text(), st.sampled_from(["python", "html", "json", "javascript", "c"]))
def test_highlighting_changes_no_character(code: str, language: str) -> None:
    assert visible(highlight(code, language)) == printable(code)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb", "a\nb"),
        ("over\rwrite", "over\u240dwrite"),
        ("\x1b[31mred", "\u241b[31mred"),
        ("\x7f\x9b", "\u2421\ufffd"),
    ],
)
def test_control_characters_are_seen_and_not_obeyed(text: str, shown: str) -> None:
    assert printable(text) == shown
