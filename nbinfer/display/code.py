"""Source code to highlighted HTML, with a handful of classes that follow the notebook's theme."""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any

from nbinfer.display.text import escape

# Done again for each update of a growing answer; past this many characters it is not worth the time.
_LONGEST = 30_000


@lru_cache(maxsize=1)
def _classes() -> dict[Any, str]:
    from pygments.token import Token  # type: ignore[import-untyped]

    return {
        Token: "",
        Token.Comment: "c",
        Token.Keyword: "k",
        Token.Operator: "o",
        Token.Operator.Word: "k",
        Token.Literal.String: "s",
        Token.Literal.Number: "m",
        Token.Name.Function: "f",
        Token.Name.Class: "f",
        Token.Name.Decorator: "f",
        Token.Name.Tag: "k",
        Token.Name.Builtin: "b",
        Token.Name.Attribute: "b",
        Token.Name.Exception: "b",
    }


def _css_class(token_type: Any) -> str:
    classes = _classes()
    while token_type not in classes:
        token_type = token_type.parent
    return classes[token_type]


@lru_cache(maxsize=128)
def highlight(code: str, language: str = "") -> str:
    """Return ``code`` as HTML, escaped; coloured when ``language`` is one that Pygments knows."""
    if not language or len(code) > _LONGEST:
        return escape(code)
    from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped]
    from pygments.util import ClassNotFound  # type: ignore[import-untyped]

    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(code)
    tokens = [(_css_class(kind), value) for kind, value in lexer.get_tokens(code)]
    if "".join(value for _, value in tokens) != code:  # colours are not worth a changed character
        return escape(code)
    pieces = []
    for css, run in groupby(tokens, key=lambda token: token[0]):
        text = escape("".join(value for _, value in run))
        pieces.append(f'<span class="nbinfer-{css}">{text}</span>' if css else text)
    return "".join(pieces)


# Copying what is selected works in pages without TLS too, where the clipboard's own interface is missing, and
# shows what was copied. These are the only words of script in any output, and the same in each. A front end
# that lets no output run script drops style sheets as well, and only ours shows the button.
COPY = "getSelection().selectAllChildren(this.nextElementSibling);document.execCommand('copy')"
_BUTTON = (
    '<button class="nbinfer-copy" type="button" style="display:none" aria-label="Copy" '
    f'onclick="{COPY}"></button>'
)


def code_block(code: str, language: str = "") -> str:
    """Return a block with ``code``, highlighted where possible, and a button that copies it."""
    return f'<div class="nbinfer-code">{_BUTTON}<pre><code>{highlight(code, language)}</code></pre></div>'
