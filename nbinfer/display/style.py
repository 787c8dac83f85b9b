"""The one style sheet of all outputs, small because every output carries it.

Colours come from the notebook's theme. Where there is none (GitHub, plain HTML) text inherits the page's
colour, and the fallback colours are mid-tones that can be read on white and on near-black alike.
"""

from __future__ import annotations

# Theme variable, fallback. The contrast of each fallback on both backgrounds is tested.
COLOURS = {
    "k": ("--jp-mirror-editor-keyword-color", "#2f8a4c"),
    "s": ("--jp-mirror-editor-string-color", "#cc4b4b"),
    "m": ("--jp-mirror-editor-number-color", "#9a7413"),
    "c": ("--jp-mirror-editor-comment-color", "#7a7f87"),
    "o": ("--jp-mirror-editor-operator-color", "#8a6fd0"),
    "f": ("--jp-mirror-editor-def-color", "#3a7fc4"),
    "b": ("--jp-mirror-editor-builtin-color", "#2e8b8b"),
    "ok": ("--jp-success-color1", "#2f8a4c"),
    "busy": ("--jp-info-color1", "#2f7fd0"),
    "warn": ("--jp-warn-color1", "#b8622b"),
    "error": ("--jp-error-color1", "#cc4b4b"),
    "off": ("--jp-border-color1", "#808080"),
}

_TINT = "var(--jp-cell-editor-background,rgba(128,128,128,.12))"
_LINE = "var(--jp-border-color2,rgba(128,128,128,.4))"
_BASE = {
    "": "color:var(--jp-content-font-color1,inherit);font-family:var(--jp-content-font-family,inherit)",
    # The distance to what follows is that of the parts, not that of their last paragraph.
    " div>:last-child": "margin-bottom:0",
    " div>:first-child": "margin-top:0",
    " h1": "font-size:1.4em",
    " h2": "font-size:1.25em",
    " h3": "font-size:1.1em",
    " pre": f"background:{_TINT};padding:.5em .8em;overflow:auto;white-space:pre;line-height:1.35",
    " code": "font-family:var(--jp-code-font-family,monospace);font-size:.92em;color:inherit;background:none",
    " :not(pre)>code": f"background:{_TINT};padding:0 .25em",
    "-code": "position:relative",
    " .nbinfer-copy": "display:block!important;position:absolute;top:.3em;right:.3em;padding:.1em .6em;"
    f"font:inherit;font-size:.75em;color:inherit;background:{_TINT};border:1px solid {_LINE};"
    "border-radius:3px;opacity:.55;cursor:pointer",
    " .nbinfer-copy::after": 'content:"Copy"',
    " .nbinfer-copy:hover,.nbinfer.nbinfer .nbinfer-copy:focus": "opacity:1",
    # A command in a table: a click selects it whole, and it breaks between its words only.
    " td>code": "user-select:all",
    " td>code span": "white-space:nowrap",
    " blockquote": f"border-left:3px solid {_LINE};margin-left:0;padding-left:1em",
    " table": "border-collapse:collapse;font-size:inherit;margin:.3em 0",
    " th,.nbinfer.nbinfer td": f"border:1px solid {_LINE};padding:.2em .6em;text-align:left;color:inherit",
    " summary": "cursor:pointer;font-size:.85em",
    " details>div": f"border-left:3px solid {_LINE};padding-left:1em;font-size:.92em",
    "-foot": "font-size:.8em;margin-top:.4em;opacity:.85",
    "-note": "border-left:4px solid;padding:.1em .7em;margin:.4em 0",
    "-badge": "border:1px solid;border-left-width:5px;border-radius:3px;padding:0 .45em;white-space:nowrap",
}


def _sheet() -> str:
    # Twice the class, because a front end's own rules for what is inside an output count for more than one.
    rules = [
        f".nbinfer{'.nbinfer' if selector[:1] == ' ' else ''}{selector}{{{body}}}"
        for selector, body in _BASE.items()
    ]
    for name, (variable, fallback) in COLOURS.items():
        # A badge's words keep the text colour: theme colours for "warning" cannot be read on white.
        what = "border-color" if len(name) > 1 else "color"
        rules.append(f".nbinfer-{name}{{{what}:var({variable},{fallback})}}")
    return f"<style>{''.join(rules)}</style>"


STYLE = _sheet()

# MathJax of JupyterLab and of nbconvert: what we show is text unless the Markdown renderer says otherwise.
NO_MATH = "tex2jax_ignore mathjax_ignore"


def page(*parts: str) -> str:
    """Return HTML ``parts`` as one output: the style sheet, and a root that is closed to MathJax."""
    return f'{STYLE}<div class="nbinfer {NO_MATH}">{"".join(parts)}</div>'
