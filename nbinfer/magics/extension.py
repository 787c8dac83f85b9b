"""Putting the magics into a shell, and taking them out."""

from __future__ import annotations

import re
from typing import Any

from IPython.core.inputtransformer2 import (
    TokenTransformBase,
    assemble_continued_line,
    find_end_of_continued_line,
)

from nbinfer.magics.completion import make_matcher
from nbinfer.magics.magics import NbInferMagics
from nbinfer.magics.settings import NbInfer

_ASKS = re.compile(r"((?:[\w.]+[ \t]*=[ \t]*)?)%infer[ \t]+(?=\S)")
_HOME = "_nbinfer_extension"


class QuestionMark(TokenTransformBase):
    """``%infer Where is Paris?`` asks the model; IPython alone would look up the help of ``Paris``."""

    priority = 1  # before IPython's own reading of a final question mark

    @classmethod
    def find(cls, tokens_by_line: Any) -> QuestionMark | None:
        """Return a transform for the first line that is ours and ends in a question mark."""
        for line in tokens_by_line:
            if len(line) <= 2 or line[-2].string != "?":  # noqa: PLR2004 - a word, the mark, the end
                continue
            first = next((token for token in line if token.string.strip()), line[0])
            if _ASKS.match(first.line[first.start[1] :]):
                return cls(first.start)
        return None

    def transform(self, lines: list[str]) -> list[str]:
        """Return the cell with that line as the call that it means."""
        end = find_end_of_continued_line(lines, self.start_line)
        indent = lines[self.start_line][: self.start_col]
        text = assemble_continued_line(lines, (self.start_line, self.start_col), end)
        match = _ASKS.match(text)
        if match is None:
            raise SyntaxError(text)
        call = f"{indent}{match[1]}get_ipython().run_line_magic('infer', {text[match.end() :].rstrip()!r})\n"
        return [*lines[: self.start_line], call, *lines[end + 1 :]]


def load(shell: Any) -> None:
    """Add magics, settings, completion and the question mark to ``shell``; a second call does nothing."""
    if getattr(shell, _HOME, None) is not None:
        return
    settings = NbInfer(parent=shell)
    magics = NbInferMagics(shell, settings)
    matcher = make_matcher(magics)
    shell.register_magics(magics)
    shell.configurables.append(settings)
    shell.events.register("post_run_cell", magics.settle)
    # Before the others of the list: transforms of the same place run by priority, then by position.
    shell.input_transformer_manager.token_transformers.insert(0, QuestionMark)
    if matcher is not None:
        shell.Completer.custom_matchers.append(matcher)
    setattr(shell, _HOME, (magics, settings, matcher))


def unload(shell: Any) -> None:
    """Take out what :func:`load` has put in."""
    home = getattr(shell, _HOME, None)
    if home is None:
        return
    magics, settings, matcher = home
    for kind, names in (("line", ("infer", "nbinfer")), ("cell", ("infer",))):
        for name in names:
            shell.magics_manager.magics[kind].pop(name, None)
    shell.magics_manager.registry.pop(type(magics).__name__, None)
    shell.configurables.remove(settings)
    shell.events.unregister("post_run_cell", magics.settle)
    shell.input_transformer_manager.token_transformers.remove(QuestionMark)
    if matcher is not None:
        shell.Completer.custom_matchers.remove(matcher)
    delattr(shell, _HOME)
