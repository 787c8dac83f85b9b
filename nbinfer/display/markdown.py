r"""Markdown that a model wrote, rendered to HTML that cannot do anything.

- Raw HTML is text. Links go to the web or to a mail address, and nowhere else. Images are links: a remote
  image is fetched when it is shown, and its address can carry out whatever was in the prompt.
- Math (``$…$``, ``$$…$$``, ``\(…\)``, ``\[…\]``) is handed on, escaped, for the front end's MathJax to
  typeset; everything else is closed to it, because MathJax has commands that make links, styles and ids, and
  definitions that hold for the whole page.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nbinfer.display.code import code_block
from nbinfer.display.style import NO_MATH
from nbinfer.display.text import escape, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markdown_it import MarkdownIt
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

_SAFE_LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)

# MathJax commands that reach beyond their formula.
_ACTIVE_TEX = re.compile(
    r"\\(href|url|class|style|css|cssId|data|require|mmlToken|unicode|bbox|includegraphics|csname|"
    r"def|gdef|let|newcommand|renewcommand|providecommand|newenvironment|renewenvironment|DeclareMathOperator|"
    r"texttip|mathtip|toggle|action)(?![A-Za-z])",
)

_MATH = "tex2jax_process mathjax_process"


def render(text: str) -> str:
    """Return ``text``, which is Markdown, as an inert HTML fragment.

    It needs no network and runs no script, whatever the text.
    """
    return f'<div class="{NO_MATH}">{_parser().render(printable(text))}</div>'


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    md = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    md.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True)
    md.block.ruler.before(
        "fence", "math_lines", _find_math_lines, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    md.inline.ruler.before("escape", "math_brackets", _find_math_brackets)
    md.validateLink = _is_safe_link  # type: ignore[method-assign]  # this is how markdown-it takes it
    for name, rule in {
        "fence": _fence,
        "code_block": _fence,
        "image": _image,
        "link_open": _link_open,
        "link_close": _link_close,
        "math_inline": _math_inline,
        "math_inline_double": _math_display,
        "math_block": _math_lines,
    }.items():
        md.add_render_rule(name, rule)
    return md


def _is_safe_link(url: str) -> bool:
    return _SAFE_LINK.match(url) is not None


def _fence(_md: Any, tokens: Sequence[Token], i: int, _options: Any, _env: Any) -> str:
    words = tokens[i].info.split()
    return code_block(tokens[i].content, words[0] if words else "")


def _anchor(url: str) -> str:
    if not _is_safe_link(url):  # an empty address is not checked by the parser; it means this very page
        return "<a>"
    return f'<a href="{escape(url)}" target="_blank" rel="noopener noreferrer nofollow">'


def _link_open(_md: Any, tokens: Sequence[Token], i: int, _options: Any, env: Any) -> str:
    env["inside a link"] = True
    return _anchor(str(tokens[i].attrGet("href") or ""))


def _link_close(_md: Any, _tokens: Sequence[Token], _i: int, _options: Any, env: Any) -> str:
    env["inside a link"] = False
    return "</a>"


def _image(_md: Any, tokens: Sequence[Token], i: int, _options: Any, env: Any) -> str:
    url = str(tokens[i].attrGet("src") or "")
    label = f"[image: {tokens[i].content}]" if tokens[i].content else "[image]"
    if env.get("inside a link"):  # an anchor inside an anchor is not HTML
        return escape(label)
    return f"{_anchor(url)}{escape(label)}</a> ({escape(urlsplit(url).hostname or url)})"


def _math(tex: str, delimiter: str) -> str:
    # A `$` inside would end the formula early, in the front end's eyes.
    if _ACTIVE_TEX.search(tex) or re.search(r"(?<!\\)\$", tex):
        return f"<code>{escape(delimiter + tex + delimiter)}</code>"
    return f'<span class="{_MATH}">{escape(delimiter + tex + delimiter)}</span>'


def _math_inline(_md: Any, tokens: Sequence[Token], i: int, _options: Any, _env: Any) -> str:
    return _math(tokens[i].content, "$")


def _math_display(_md: Any, tokens: Sequence[Token], i: int, _options: Any, _env: Any) -> str:
    return _math(tokens[i].content, "$$")


def _math_lines(_md: Any, tokens: Sequence[Token], i: int, _options: Any, _env: Any) -> str:
    return f"<p>{_math(tokens[i].content, '$$')}</p>"


def _find_math_lines(state: StateBlock, first: int, end: int, silent: bool) -> bool:  # noqa: FBT001 - markdown-it's
    r"""Block rule: ``$$`` or ``\[`` at the start of a line, up to a line that ends with its partner.

    Also straight after a line of text, where most models put it; what stands between is not Markdown.
    """
    start = state.bMarks[first] + state.tShift[first]
    opening = state.src[start : start + 2]
    closing = {"$$": "$$", "\\[": "\\]"}.get(opening)
    if closing is None or state.is_code_block(first) or state.env.get(f"no {closing} before") == end:
        return False
    pieces: list[str] = []
    for line in range(first, end):
        if line > first and state.sCount[line] < state.blkIndent and not state.isEmpty(line):
            return False  # out of the list item or quotation that it began in
        at = start + 2 if line == first else state.bMarks[line]
        text = state.src[at : state.eMarks[line]].rstrip()
        if text.endswith(closing):
            if silent:
                return True
            token = state.push("math_block", "", 0)
            token.content = "\n".join([*pieces, text.removesuffix(closing)])
            token.map = [first, line + 1]
            state.line = line + 1
            return True
        if closing in text:  # ends inside a line: leave it to the inline rules
            return False
        pieces.append(text)
    # Remembered, so that a text full of openings is read once and not once per opening.
    state.env[f"no {closing} before"] = end
    return False


def _find_math_brackets(state: StateInline, silent: bool) -> bool:  # noqa: FBT001 - markdown-it's signature
    r"""Inline rule: ``\(…\)`` and ``\[…\]``."""
    opening = state.src[state.pos : state.pos + 2]
    closing = {"\\(": "\\)", "\\[": "\\]"}.get(opening)
    if closing is None:
        return False
    end = state.src.find(closing, state.pos + 2, state.posMax)
    if end < 0 or not state.src[state.pos + 2 : end].strip():
        return False
    if not silent:
        token = state.push("math_inline" if opening == "\\(" else "math_inline_double", "", 0)
        token.content = state.src[state.pos + 2 : end].strip()
    state.pos = end + 2
    return True
