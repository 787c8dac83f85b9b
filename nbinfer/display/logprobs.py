"""How sure a model was, token by token: shades of one colour over the answer, and a table in a terminal.

Hovering over a token shows its probability and what else it could have been; the same stands in a folded
table, for keyboards and phones. The shade is an inline style, which front ends keep in notebooks that they do
not trust, where they drop style sheets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nbinfer.display.style import page
from nbinfer.display.text import escape, printable

if TYPE_CHECKING:
    from nbinfer.contract.rendering import Bundle
    from nbinfer.contract.results import Logprobs, TokenLogprob

# Least probability, words of the legend, opacity of the shade, and a line for who cannot see the shade.
BANDS: tuple[tuple[float, str, float, str], ...] = (
    (0.9, "90 % and more", 0.0, "none"),
    (0.7, "70 to 90 %", 0.18, "none"),
    (0.4, "40 to 70 %", 0.32, "none"),
    (0.1, "10 to 40 %", 0.45, "dotted"),
    (0.0, "below 10 %", 0.6, "solid"),
)
_HUE = "232,89,12"  # with black on white and with white on black it can be read at every opacity above
_MOST_ROWS = 500
_TEXT_ROWS = 40


def logprobs_bundle(logprobs: Logprobs) -> Bundle:
    """Return (data, metadata) of the tokens of one answer."""
    return {"text/plain": _plain(logprobs), "text/html": _html(logprobs)}, {}


def _html(logprobs: Logprobs) -> str:
    tokens = "".join(_token(each) for each in logprobs.tokens)
    shown = f'<div style="white-space:pre-wrap;line-height:1.9">{tokens}</div>'
    legend = " ".join(f"<span{_style(i)}>{words}</span>" for i, (_, words, _, _) in enumerate(BANDS))
    foot = f'<div class="nbinfer-foot">{escape(_summary(logprobs))}<br>Probability: {legend}</div>'
    return page(shown, foot, _table(logprobs))


def _token(token: TokenLogprob) -> str:
    words = escape("\n".join([_named(token.token, token.logprob), *_instead(token)]))
    # A line end has no width: a sign stands for it, before it.
    text = escape(token.token.replace("\r\n", "\n")).replace("\n", "⏎\n")
    return f'<span{_style(_band(token))} title="{words}">{text}</span>'


def _band(token: TokenLogprob) -> int:
    share = math.exp(token.logprob)
    return next(i for i, (least, *_) in enumerate(BANDS) if share >= least or i == len(BANDS) - 1)


def _style(band: int) -> str:
    _, _, opacity, line = BANDS[band]
    if not opacity:
        return ""
    under = "" if line == "none" else f";border-bottom:2px {line}"
    return f' style="background-color:rgba({_HUE},{opacity:g});padding:.15em 0{under}"'


def _percent(logprob: float) -> str:
    share = 100 * math.exp(logprob)
    return f"{share:.3g} %" if share >= 0.001 else "< 0.001 %"  # noqa: PLR2004 - a small share


def _quoted(text: str) -> str:
    return repr(printable(text))


def _named(text: str, logprob: float) -> str:
    return f"{_quoted(text)} {_percent(logprob)}"


def _instead(token: TokenLogprob) -> list[str]:
    return [_named(text, logprob) for text, logprob in token.top if text != token.token]


def _summary(logprobs: Logprobs) -> str:
    count = len(logprobs.tokens)
    parts = [logprobs.model, f"{count} token{'' if count == 1 else 's'}"]
    parts.append(f"perplexity {logprobs.perplexity:.3g}")
    return " · ".join(part for part in parts if part)


def _table(logprobs: Logprobs) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(_quoted(each.token))}</code></td><td>{escape(_percent(each.logprob))}</td>"
        f"<td>{escape(', '.join(_instead(each)))}</td></tr>"
        for each in logprobs.tokens[:_MOST_ROWS]
    )
    more = len(logprobs.tokens) - _MOST_ROWS
    rest = f"<p>… {more:,} more tokens</p>" if more > 0 else ""
    head = "<tr><th>token</th><th>probability</th><th>instead</th></tr>"
    return f"<details><summary>As a table</summary><div><table>{head}{rows}</table>{rest}</div></details>"


def _plain(logprobs: Logprobs) -> str:
    """Return the answer, and a line per token; of a long one the least sure tokens, in their order."""
    tokens = logprobs.tokens
    least = sorted(range(len(tokens)), key=lambda i: tokens[i].logprob)[:_TEXT_ROWS]
    rows = [
        (_quoted(tokens[i].token), _percent(tokens[i].logprob), ", ".join(_instead(tokens[i])))
        for i in sorted(least)
    ]
    answer = printable("".join(each.token for each in tokens))
    head = f"[{_summary(logprobs)}]"
    if len(rows) < len(tokens):
        head += f" the {len(rows)} least sure:"
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [f"{token:<{widths[0]}}  {share:>{widths[1]}}  {rest}".rstrip() for token, share, rest in rows]
    return "\n".join([answer, printable(head), *lines])
