"""A magic's line is read as a person meant it, and an error says what to type instead."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.error import UsageError

from nbinfer import session
from nbinfer.contract.requests import Sampling
from nbinfer.magics.options import COMMANDS, INFER, command_help, flag_words, infer_help, nbinfer_help
from nbinfer.magics.parser import find_command, next_word, parse_command, parse_infer


def words(line: str) -> list[str]:
    found, at = [], 0
    while (word := next_word(line, at)) is not None:
        found.append(word.text)
        at = word.end
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a  b\tc", ["a", "b", "c"]),
        ('-s "You are terse"', ["-s", "You are terse"]),
        ("-s 'You are terse'", ["-s", "You are terse"]),
        ('--system="You are terse" x', ["--system=You are terse", "x"]),
        (r"--grammar C:\tmp\g.gbnf", ["--grammar", r"C:\tmp\g.gbnf"]),
        ("""-p 'a={"b": 1}'""", ["-p", 'a={"b": 1}']),
        ("-s don't", ["-s", "don't"]),
        ('-s "it\'s fine"', ["-s", "it's fine"]),
        ('"say "hi" now"', ['say "hi', 'now"']),
        ('""', [""]),
        ("-s {{ a b }} x", ["-s", "{{ a b }}", "x"]),
        ('-s "be {{ d["k"] }}" x', ["-s", 'be {{ d["k"] }}', "x"]),
        ("{{ never closed", ["{{", "never", "closed"]),
        ("", []),
    ],
)
def test_words_and_quotations(line: str, expected: list[str]) -> None:
    assert words(line) == expected


@given(
    st.lists(st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="\"'{}="), min_size=1))
)
def test_words_without_quotations_are_split_at_spaces(parts: list[str]) -> None:
    assert words(" ".join(parts)) == parts


def read(line: str, *, cell: bool = True, **options: Any) -> dict[str, Any]:
    return parse_infer(line, cell=cell, **options).values


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {}),
        ("demo", {"model": "demo"}),
        ("-m demo -t 0.5 -n 64", {"model": "demo", "temperature": 0.5, "max_tokens": 64}),
        ("-t0.5 -n64", {"temperature": 0.5, "max_tokens": 64}),
        ("--max-tokens=64 --seed=7", {"max_tokens": 64, "seed": 7}),
        ("--reasoning-budget -1", {"reasoning_budget": -1}),
        ("-s --terse", {"system": "--terse"}),
        ("--stop a --stop 'b c'", {"stop": ["a", "b c"]}),
        (r"--stop \n --stop '\\n \t \d'", {"stop": ["\n", "\\n \t \\d"]}),
        (r"-s 'a\nb'", {"system": r"a\nb"}),
        ("-p top_k=3 -p note=hi -p x=[1,2]", {"params": [("top_k", 3), ("note", "hi"), ("x", [1, 2])]}),
        ("--choices 'yes, no'", {"choices": ["yes", "no"]}),
        ("--choices labels", {"choices": "labels"}),
        ("--think", {"think": True}),
        ("--no-think", {"think": False}),
        ("-c", {"chat": ""}),
        ("-c story", {"chat": "story"}),
        ("-c --new", {"chat": "", "new": True}),
        ("--chat=story demo", {"chat": "story", "model": "demo"}),
        ("-f code -x -q", {"view": "code", "extract": True, "quiet": True}),
        ("-o answer --raw --dry-run", {"out": "answer", "raw": True, "dry_run": True}),
        ("--json --no-stream -h", {"json": True, "no_stream": True, "help": True}),
    ],
)
def test_options_of_a_cell(line: str, values: dict[str, Any]) -> None:
    assert read(line) == values


@pytest.mark.parametrize(
    ("line", "values", "prompt"),
    [
        ("What is up?", {}, "What is up?"),
        ("-t 0 What's  up?  --seed 3 ", {"temperature": 0.0}, "What's  up?  --seed 3 "),
        ("-- -q is a flag", {}, "-q is a flag"),
        ("-c What is 2+2", {"chat": ""}, "What is 2+2"),
        ("--chat=story go on", {"chat": "story"}, "go on"),
        ("-5 + 3 =", {}, "-5 + 3 ="),
        ('"quoted" words', {}, '"quoted" words'),
        ('{"json": 1}', {}, '{"json": 1}'),
        ("-x -- --  y", {"extract": True}, "--  y"),
        ("- a list item", {}, "- a list item"),
    ],
)
def test_a_line_ends_in_its_prompt_to_the_character(line: str, values: dict[str, Any], prompt: str) -> None:
    found = parse_infer(line, cell=False)
    assert (found.values, found.rest) == (values, prompt)


@pytest.mark.parametrize(
    ("line", "cell", "parts"),
    [
        ("--temprature 1", True, ["--temprature", "Did you mean --temperature?", "%%infer --help"]),
        ("--temprature 1 x", False, ["Did you mean --temperature?", "after --"]),
        ("-Z", True, ["-Z", "%%infer --help"]),
        ("-t hot", True, ["--temperature", "a number", "'hot'"]),
        ("-n 1.5", True, ["--max-tokens", "a whole number", "'1.5'"]),
        ("-t", True, ["--temperature needs a value", "X"]),
        ("-o 1x", True, ["--out", "name of a variable", "'1x'"]),
        ("-o class", True, ["--out", "name of a variable"]),
        ("-f htlm", True, ["rich, text, code, json, html", "Did you mean html?"]),
        ("-p top_k", True, ["KEY=JSON", "top_k"]),
        ("-q=1", True, ["-q takes no value"]),
        ("-s 'open", True, ["column 4", "never closed"]),
        ("--seed 1 --seed 2", True, ["--seed is given twice"]),
        ("--think --no-think", True, ["opposite"]),
        ("a b", True, ["one MODEL", "'a b'"]),
        ("a -m b", True, ["given twice"]),
        ("-s a --system-var b", True, ["--system-var"]),
        ("-x -f json", True, ["--extract", "json"]),
        ("--new", True, ["--chat"]),
        ("--over df --chat x", True, ["--chat", "--over"]),
        ("-t 1 -p temperature=2", True, ["temperature", "twice", "--temperature", "--param"]),
        ("-p stop=a --stop b", True, ["stop", "twice", "--stop"]),
        ("-p top_k=1 -p top_k=2", True, ["top_k", "twice"]),
        ("--no-think -p think=true", True, ["think", "twice"]),
        ("--over df --dry-run", True, ["--dry-run", "--over"]),
    ],
)
def test_a_typing_mistake_is_a_usage_error_that_names_the_fix(
    line: str, cell: bool, parts: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_infer(line, cell=cell)
    # IPython shows the short form only for UsageError itself.
    assert type(caught.value) is UsageError
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.count("\n") < 4


def test_values_are_expanded_before_they_are_converted_unless_raw() -> None:
    assert read("-t {{ x }}", expand=lambda text: text.replace("{{ x }}", "0.5")) == {"temperature": 0.5}
    assert read("-s {{x}} --raw", expand=lambda _: "no")["system"] == "{{x}}"
    assert read("{{x}}", expand=lambda _: "demo") == {"model": "demo"}


@pytest.mark.parametrize(
    "line", ["", "load", "load a b", "unload a b", "ps x", "load a -c 1 -p context_size=2"]
)
def test_commands_check_their_words(line: str) -> None:
    name, _, rest = line.partition(" ")
    with pytest.raises(UsageError):
        parse_command(find_command(name), rest)


def test_an_unknown_command_names_the_nearest_and_all() -> None:
    with pytest.raises(UsageError, match="Did you mean load") as caught:
        find_command("laod")
    assert all(command.name in str(caught.value) for command in COMMANDS)


# -- one table ----------------------------------------------------------------------------------------------

# Keywords of infer() without an option of their own; -p reaches them.
BY_PARAM = {"logit_bias", "tools", "priority"}
# ... and what the cell itself stands for.
THE_CELL = {"messages"}


def test_each_option_has_its_keyword_in_infer_and_each_keyword_its_option() -> None:
    offered = {option.keyword for option in INFER if option.keyword} - {"model"}
    assert offered <= set(session.OPTIONS)
    assert set(session.OPTIONS) - offered == BY_PARAM | THE_CELL
    assert "model" in inspect.signature(session.infer).parameters


def test_load_options_are_keywords_of_load() -> None:
    known = set(inspect.signature(session.load).parameters)
    load = find_command("load")
    assert {option.keyword for option in load.options if option.keyword} <= known
    # Everything a person may want to say; `progress` is the magic's own.
    assert known - {o.keyword for o in load.options} == {"ref", "progress", "backend_options"}


def test_sampling_options_mention_only_what_sampling_knows() -> None:
    fields = set(Sampling.__dataclass_fields__)
    floats = {option.name for option in INFER if option.kind == "float" and not option.images}
    assert floats <= fields


def test_no_flag_means_two_things() -> None:
    for options in (INFER, *(command.options for command in COMMANDS)):
        flags = [flag for option in options for flag in option.flags]
        assert len(flags) == len(set(flags))


def test_help_shows_every_option_and_command() -> None:
    assert all(flag_words(option) in infer_help() for option in INFER)
    assert all(command.help in " ".join(nbinfer_help().split()) for command in COMMANDS)
    helps = [infer_help(), nbinfer_help(), *map(command_help, COMMANDS)]
    assert max(len(line) for text in helps for line in text.splitlines()) <= 80
