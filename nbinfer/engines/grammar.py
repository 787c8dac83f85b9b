"""A constraint in llguidance's words: both engines of this package keep to the same grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import BackendUnavailable, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.contract.requests import Constraint

# One line, spaced as Python and most training text write it. Free white space is where small models get lost:
# they write blanks until their tokens run out.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def guidance_grammar(constraint: Constraint) -> str:
    """Return a constraint as a grammar for ``llguidance.LLMatcher``.

    Raises
    ------
    BackendUnavailable
        llguidance is not installed.
    RequestError
        The constraint cannot be read.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as e:
        raise BackendUnavailable(
            "constrained output needs llguidance.\nInstall it with: pip install llguidance"
        ) from e
    kind, value = constraint.kind, constraint.value
    try:
        if kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(value, defaults=JSON_STYLE))
        if kind == "json":
            return str(LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_STYLE))
        if kind == "regex":
            return str(LLMatcher.grammar_from_regex(value))
        return str(LLMatcher.grammar_from_lark(lark_text(constraint)))
    except (ValueError, TypeError) as e:
        raise unusable(constraint, str(e)) from e


def checked_grammar(constraint: Constraint, tokens: Callable[[], Any]) -> str:
    """Return a constraint as a grammar that a model can keep to.

    Parameters
    ----------
    constraint
        What was asked.
    tokens
        Returns the model's ``llguidance.LLTokenizer``; called when the constraint could be read.

    Raises
    ------
    BackendUnavailable
        llguidance is not installed.
    RequestError
        The schema, expression or grammar is not valid.
    """
    grammar = guidance_grammar(constraint)
    from llguidance import LLMatcher

    try:
        problem = LLMatcher.validate_grammar(grammar, tokens())
    except (ValueError, TypeError) as e:
        problem = str(e)
    if problem:
        raise unusable(constraint, problem)
    return grammar


def lark_text(constraint: Constraint) -> str:
    """Return choices, or a grammar in Lark's or GBNF's words, as Lark text."""
    if constraint.kind == "choices":
        return f"start: {' | '.join(json.dumps(str(choice)) for choice in constraint.value)}"
    if "::=" in constraint.value:
        from llguidance import gbnf_to_lark

        return str(gbnf_to_lark.any_to_lark(constraint.value))
    return str(constraint.value)


def unusable(constraint: Constraint, problem: str) -> RequestError:
    """Return the error for a constraint that llguidance refuses."""
    kind = constraint.kind.replace("_", " ")
    return RequestError(f"the {kind} cannot be used as a constraint: {problem[:300]}")
