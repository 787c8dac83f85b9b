"""Constraints are refused before they run, with the reason, behind every engine."""

from __future__ import annotations

from typing import Any

import pytest

from nbinfer.contract.errors import RequestError
from nbinfer.contract.requests import Constraint
from nbinfer.engines.grammar import checked_grammar, guidance_grammar

llguidance = pytest.importorskip("llguidance")


def tokens() -> Any:
    return llguidance.LLTokenizer("byte")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", {"type": "object", "properties": {"a": {"type": "integer"}}}),
        ("json", None),
        ("regex", "[ab]+"),
        ("choices", ("yes", "no")),
        ("grammar", 'start: "a"'),
        ("grammar", 'root ::= "a"'),
    ],
)
def test_a_constraint_that_can_be_kept_is_its_grammar(kind: Any, value: Any) -> None:
    constraint = Constraint(kind, value)
    assert checked_grammar(constraint, tokens) == guidance_grammar(constraint)


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("json_schema", {"type": "nothing"}, "json schema"),
        ("regex", "(", "regex"),
        ("grammar", "start: missing", "grammar"),
    ],
)
def test_one_that_cannot_is_refused_with_the_reason(kind: Any, value: Any, said: str) -> None:
    with pytest.raises(RequestError, match=f"the {said} cannot be used as a constraint: .+"):
        checked_grammar(Constraint(kind, value), tokens)


def test_a_tokenizer_that_cannot_be_used_is_said_too() -> None:
    def broken() -> Any:
        raise ValueError("no such tokenizer")

    with pytest.raises(RequestError, match="no such tokenizer"):
        checked_grammar(Constraint("regex", "a"), broken)
