"""How sure a model was: shades, words on hover, a table, and text for a terminal."""

from __future__ import annotations

import re
from math import log

import pytest
from support.hostile import CORPUS, problems

from nbinfer.contract.errors import RequestError
from nbinfer.contract.results import Logprobs, Result, TokenLogprob
from nbinfer.display.logprobs import BANDS
from nbinfer.display.style import STYLE

TOKENS = (
    TokenLogprob("The", log(0.99), (("The", log(0.99)), ("A", log(0.01)))),
    TokenLogprob(" answer", log(0.8), ((" answer", log(0.8)), (" result", log(0.15)))),
    TokenLogprob("\n", log(0.5), (("\n", log(0.5)), (".", log(0.5)))),
    TokenLogprob("42", log(0.05), (("41", log(0.9)), ("42", log(0.05)))),
)


def view(tokens: tuple[TokenLogprob, ...] = TOKENS, model: str = "demo") -> Logprobs:
    return Result(text="".join(t.token for t in tokens), logprobs=tokens, model=model).show_logprobs()


def html(shown: Logprobs) -> str:
    return str(shown._repr_mimebundle_()[0]["text/html"])


def tooltips(page: str) -> list[str]:
    return re.findall(r'<span [^>]*title="([^"]*)"', page)


def test_an_answer_without_them_says_how_to_ask() -> None:
    with pytest.raises(RequestError, match=r"logprobs=3"):
        Result(text="x").show_logprobs()


def test_each_token_has_its_probability_and_what_it_could_have_been() -> None:
    page = html(view())
    assert tooltips(page)[1] == "&#x27; answer&#x27; 80 %\n&#x27; result&#x27; 15 %"
    assert [tip.count("\n") for tip in tooltips(page)] == [1, 1, 1, 1]
    assert "⏎\n" in page
    assert "<td><code>&#x27;42&#x27;</code></td><td>5 %</td><td>&#x27;41&#x27; 90 %</td>" in page


@pytest.mark.parametrize(
    ("share", "band"), [(1.0, 0), (0.91, 0), (0.89, 1), (0.6, 2), (0.2, 3), (0.02, 4), (0.0, 4)]
)
def test_the_less_likely_the_darker_and_the_legend_says_what_it_means(share: float, band: int) -> None:
    token = TokenLogprob("x", log(share) if share else -1000.0)
    page = html(view((token,)))
    (style,) = re.findall(r'<span( style="[^"]*")? title', page)
    _, words, opacity, _ = BANDS[band]
    assert (f",{opacity:g})" in style) == (band > 0)
    assert f"<span{style}>{words}</span>" in page


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
def test_hostile_tokens_are_inert(text: str) -> None:
    shown = view((TokenLogprob(text, -1.0, ((text, -1.0), (text[::-1], -2.0))),), model=text)
    # The reader allows what a model's Markdown may have; tokens have shades and words beside.
    page = re.sub(r'<span( style="[a-z0-9:;(),.% -]*")? title="[^"<>]*">', "<span>", html(shown))
    page = re.sub(r'<(span|div) style="[a-z0-9:;(),.% -]*">', r"<\1>", page)
    assert problems(page, style=STYLE) == []
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", repr(shown))


def test_a_terminal_gets_a_line_per_token() -> None:
    lines = repr(view()).splitlines()
    assert lines[:2] == ["The answer", "42"]
    assert re.fullmatch(r"\[demo · 4 tokens · perplexity 2\.67\]", lines[2])
    assert lines[3] == "'The'      99 %  'A' 1 %"
    assert lines[6] == "'42'        5 %  '41' 90 %"


def test_a_long_answer_is_cut_to_its_least_sure_tokens_in_their_order() -> None:
    tokens = tuple(TokenLogprob(f"t{i}", -0.01 if i % 7 else -3.0) for i in range(700))
    lines = repr(view(tokens)).splitlines()
    assert lines[1].endswith("the 40 least sure:")
    assert [line.split()[0] for line in lines[2:4]] == ["'t0'", "'t7'"]
    assert len(lines) == 42
    assert "… 200 more tokens" in html(view(tokens))


def test_the_frame_is_data() -> None:
    frame = view().to_frame()
    assert list(frame.columns) == ["token", "probability", "instead"]
    assert frame["probability"].tolist() == pytest.approx([0.99, 0.8, 0.5, 0.05])
    assert frame["instead"][3] == pytest.approx({"41": 0.9})


def test_an_answer_of_no_tokens_is_shown() -> None:
    assert view(()).perplexity == 1.0
    assert "0 tokens" in repr(view(()))
