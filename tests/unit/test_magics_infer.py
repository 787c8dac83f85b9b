"""%infer and %%infer in a shell: what reaches the model, what is shown, what is bound, what is raised."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import threading
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from IPython.core.error import UsageError
from pydantic import BaseModel
from support.fake_engine import HANG, FakeEngine
from support.notebook import Notebook, notebook

from nbinfer.contract.errors import EngineError, ModelNotFound, RequestError
from nbinfer.contract.requests import CompletionRequest, Constraint, EmbeddingRequest
from nbinfer.contract.results import Delta, Result
from nbinfer.display.style import STYLE
from nbinfer.engines.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def nb() -> Iterator[Notebook]:
    with notebook() as opened:
        yield opened


@pytest.fixture
def fake(nb: Notebook) -> FakeEngine:
    engine = FakeEngine()
    nb.add(engine)
    return engine


def asked(engine: FakeEngine) -> CompletionRequest:
    request = engine.requests[-1]
    assert isinstance(request, CompletionRequest)
    return request


def asked_text(engine: FakeEngine) -> Any:
    messages = asked(engine).messages
    assert messages is not None
    return messages[-1]["content"]


# -- what reaches the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        '{"a": {"b": [1, 2]}}',
        "def f():\n\treturn f'{x}'  # $HOME\n\n\nf()",
        r"\frac{1}{2} and \(x\)",
        "  leading and trailing  \n",
        "%infer is a magic\n%%infer too\n!ls\n?help?",
        'it\'s "quoted" \\ `code`',
    ],
)
def test_a_cell_reaches_the_model_to_the_character(nb: Notebook, fake: FakeEngine, body: str) -> None:
    nb.run(f"%%infer -q\n{body}")
    # The notebook itself ends a cell with one line end.
    assert asked_text(fake) == body.removesuffix("\n")


@pytest.mark.parametrize(
    "prompt",
    ["Where is Paris?", "What's up??", "is {this} $5?", "say \"hi\" to 'them'", "a  b", "why? because"],
)
def test_a_line_reaches_the_model_to_the_character(nb: Notebook, fake: FakeEngine, prompt: str) -> None:
    nb.run(f"%infer -q {prompt}")
    assert asked_text(fake) == prompt
    nb.run(f"if True:\n    x = %infer -q {prompt}")
    assert asked_text(fake) == prompt
    assert nb["x"].text == prompt


def test_a_question_mark_elsewhere_is_still_help(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("text = '''\n%infer What?\n'''")
    assert nb["text"] == "\n%infer What?\n"
    assert "%infer [options]" in nb.shell.object_inspect_text("%infer")
    nb.run("%infer?")
    assert fake.requests == []


def test_values_of_the_notebook_go_in_unless_raw(nb: Notebook, fake: FakeEngine) -> None:
    nb.set(city="Paris", style="terse and kind")
    nb.run('%%infer -q -s "be {{ style }}"\nWhere is {{ city }} {city}?')
    assert asked_text(fake) == "Where is Paris {city}?"
    assert (asked(fake).messages or ())[0] == {"role": "system", "content": "be terse and kind"}
    nb.run("%%infer -q --raw\n{{ city }}")
    assert asked_text(fake) == "{{ city }}"


def test_a_line_inside_a_function_sees_its_variables_first(nb: Notebook, fake: FakeEngine) -> None:
    nb.set(city="Rome", shade="red")
    nb.run(
        "def ask(city, kinds):\n"
        "    %infer -q --choices kinds {{ city }} {{ shade }}\n"
        "    answer = %infer -q Where is {{ city }}?\n"
        "    return answer\n"
    )
    assert nb.run("ask('Paris', ['red', 'blue'])").text == "Where is Paris?"
    first = fake.requests[0]
    assert isinstance(first, CompletionRequest)
    assert (first.messages or ())[-1]["content"] == "Paris red"
    assert first.constraint == Constraint("choices", ("red", "blue"))
    nb.run("%infer -q {{ city }}")
    assert asked_text(fake) == "Rome"


def test_in_out_and_the_last_error_can_be_asked_about(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("6 * 7")
    with pytest.raises(ZeroDivisionError):
        nb.run("1 / 0")
    nb.run("%%infer -q\n{{ Out.values() | list }} {{ last_error }}")
    assert "42" in asked_text(fake)
    assert "ZeroDivisionError" in asked_text(fake)


@pytest.mark.parametrize("option", ["", "--dry-run"])
@pytest.mark.parametrize(
    "expression",
    [
        "get_ipython().system('touch ran')",
        "ip.system('touch ran')",
        "open('ran', 'w')",
        "exit()",
        "_dh[0].joinpath('ran').touch()",
        "__builtins__.open('ran', 'w')",
    ],
)
def test_a_pasted_prompt_reaches_neither_the_shell_nor_a_file(
    nb: Notebook,
    fake: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    expression: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    nb.run("import os\n_dh[:] = [__import__('pathlib').Path.cwd()]\nip = get_ipython()")
    with pytest.raises(UsageError):
        nb.run(f"%%infer -q {option}\n{{{{ {expression} }}}}")
    assert list(tmp_path.iterdir()) == []
    assert (fake.requests, nb.outputs) == ([], [])


class Person(BaseModel):
    name: str


def test_options_arrive_as_what_they_mean(nb: Notebook, fake: FakeEngine, tmp_path: Path) -> None:
    grammar = tmp_path / "g.lark"
    grammar.write_text('start: "x"')
    nb.set(Person=Person, shapes={"Person": {"type": "object"}}, labels=["yes", "no"], rules="be brief")
    cases: dict[str, Any] = {
        "-t 0.5 --top-k 3 --seed 7": lambda r: (r.sampling.temperature, r.sampling.top_k, r.sampling.seed)
        == (0.5, 3, 7),
        "-n 5 --stop END --stop '##'": lambda r: (r.max_tokens, r.stop) == (5, ("END", "##")),
        "-p presence_penalty=0.5 -p logprobs=2": lambda r: (r.sampling.presence_penalty, r.logprobs)
        == (0.5, 2),
        "--schema Person": lambda r: r.constraint.value["properties"]["name"]["type"] == "string",
        "--choices labels": lambda r: r.constraint.value == ("yes", "no"),
        "--choices {{ labels[0] }},no": lambda r: r.constraint.value == ("yes", "no"),
        "--choices a,b": lambda r: r.constraint.value == ("a", "b"),
        "--regex '[0-9]+'": lambda r: r.constraint.value == "[0-9]+",
        f"--grammar {grammar}": lambda r: r.constraint.value == 'start: "x"',
        "--json": lambda r: r.constraint.kind == "json",
        "--no-think --reasoning-budget -1": lambda r: (r.think, r.reasoning_budget) == (False, -1),
        "--no-template": lambda r: (r.prompt, r.messages) == ("{}", None),
        "--system-var rules": lambda r: r.messages[0]["content"] == "be brief",
    }

    def script(request: CompletionRequest) -> list[str]:
        rule = request.constraint
        return [rule.value[0] if rule is not None and rule.kind == "choices" else '{"name": "x"}']

    fake.script = script
    for line, check in cases.items():
        nb.run(f"%%infer -q {line}\n{{}}")
        assert check(asked(fake)), line


def test_images_are_variables_or_files(nb: Notebook, fake: FakeEngine, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"png")
    nb.set(photo=b"bytes")
    nb.run(f"%%infer -q --image photo --image {path}\nwhat is it?")
    assert asked(fake).images == (b"bytes", b"png")


def test_the_typed_value_comes_back(nb: Notebook, fake: FakeEngine) -> None:
    nb.set(Person=Person)
    fake.script = ['{"name": ', '"Ada"}']
    nb.run("%%infer -o r --schema Person\nwho?")
    assert nb["r"].parsed == Person(name="Ada")
    assert "<td>Ada</td>" in nb.outputs[-1]["data"]["text/html"]


# -- which model --------------------------------------------------------------------------------------------


def test_the_model_is_the_one_named_or_configured_or_the_only_one(nb: Notebook) -> None:
    a, b = FakeEngine(model="a"), FakeEngine(model="b")
    with pytest.raises(ModelNotFound, match="Nothing is loaded"):
        nb.run("%infer hi")
    nb.add(a, "a")
    nb.run("%infer -q hi")
    nb.add(b, "b")
    with pytest.raises(ModelNotFound, match="a, b"):
        nb.run("%infer hi")
    nb.run("%infer -q -m b hi")
    nb.run("%%infer b -q\nhi")
    nb.run("%nbinfer alias short b.gguf\n%infer -q -m short hi")
    nb.run("%config NbInfer.model = 'b'\n%infer -q hi")
    assert (len(a.requests), len(b.requests)) == (1, 4)


# -- what is shown and bound --------------------------------------------------------------------------------


def test_one_output_is_updated_in_place(nb: Notebook, fake: FakeEngine) -> None:
    fake.script = lambda _: ["one ", 0.2, "two ", 0.2, "three"]
    nb.run("%%infer\ngo")
    ids = {output["transient"]["display_id"] for output in nb.outputs}
    assert len(ids) == 1
    assert [output["update"] for output in nb.outputs] == [False] + [True] * (len(nb.outputs) - 1)
    assert nb.texts[0] == "one "
    assert nb.texts[-1] == "one two three"
    assert all(later.startswith(earlier) for earlier, later in zip(nb.texts, nb.texts[1:], strict=False))
    assert nb.outputs[-1]["metadata"]["nbinfer"]["model"] == "fake"
    assert "text/markdown" not in nb.outputs[-1]["data"]


def test_out_underscore_assignment_and_binding_are_one_result(nb: Notebook, fake: FakeEngine) -> None:
    value = nb.run("%infer -o bound hello")
    assert value is nb["bound"] is nb["_"]
    assert nb["Out"][nb.shell.execution_count - 1] is value
    assert isinstance(value, Result)
    assert (value.text, str(value), value.finish_reason) == ("hello", "hello", "stop")
    nb.run("x = %infer -o y hello")
    assert nb["x"] is nb["y"]


def test_a_result_is_shown_once_by_its_cell_and_again_when_asked(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown_by_hook() -> bool:
        return "hello" in capsys.readouterr().out

    nb.run("%infer hello")
    assert not shown_by_hook()
    nb.run("_")
    assert shown_by_hook()
    nb.run("x = %infer hello")
    assert not shown_by_hook()
    nb.run("x")  # the first time that it is asked for by name
    assert shown_by_hook()
    nb.run("%infer -q hello")
    assert not shown_by_hook()
    assert nb.outputs == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-f text", {"text/plain": "a\n```py\nx = 1\n```"}),
        ("-x", {"text/plain": "x = 1"}),
        ("-f code", {"text/plain": "x = 1"}),
    ],
)
def test_views(nb: Notebook, fake: FakeEngine, line: str, expected: dict[str, str]) -> None:
    fake.script = ["a\n```py\nx = 1\n```"]
    nb.run(f"%%infer -o r {line}\ngo")
    data = nb.outputs[-1]["data"]
    assert {kind: data[kind] for kind in expected} == expected
    assert ("text/html" in data) == ("text" not in line)
    assert nb["r"].text == "a\n```py\nx = 1\n```"
    assert nb["r"].code == "x = 1"


def test_no_stream_shows_the_end_alone(nb: Notebook, fake: FakeEngine) -> None:
    fake.script = lambda _: ["one ", 0.2, "two"]
    nb.run("%%infer --no-stream\ngo")
    assert nb.texts == ["one two"]
    nb.run("%config NbInfer.stream = False\n%infer go")
    assert nb.texts == ["one two"]


def test_settings_choose_view_and_footer(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("%config NbInfer.format = 'text'\n%infer hi")
    assert set(nb.outputs[-1]["data"]) == {"text/plain"}
    nb.run("%config NbInfer.format = 'rich'\n%config NbInfer.footer = False\n%infer hi")
    assert "nbinfer-foot" not in nb.outputs[-1]["data"]["text/html"].removeprefix(STYLE)


def test_plain_display_prints_in_a_console_on_a_kernel(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    nb.run("%config NbInfer.display = 'plain'\n%infer hi there")
    assert "hi there\n" in capsys.readouterr().out
    assert nb.outputs == []


def test_a_dry_run_shows_the_prompt_and_runs_nothing(nb: Notebook, fake: FakeEngine) -> None:
    nb.set(x="<b>")
    nb.run("%%infer --dry-run -s 'be kind'\nhello {{ x }}")
    (text,) = nb.texts
    assert text.startswith("system: be kind\nuser: hello <b>\nassistant:")
    assert "7 of 512 tokens" in text
    assert "hello &lt;b&gt;" in nb.outputs[0]["data"]["text/html"]
    assert fake.requests == []


def test_help_is_shown_and_asks_nothing(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("%infer --help")
    assert "--max-tokens" in nb.texts[0]
    nb.run("%%infer -h\nbody")
    assert "--max-tokens" in nb.texts[0]
    assert fake.requests == []


# -- conversations ------------------------------------------------------------------------------------------


def test_cells_are_on_their_own_unless_a_conversation_is_named(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("%infer -q one")
    nb.run("%infer -q two")
    assert len(asked(fake).messages or ()) == 1
    nb.run("%%infer -q -c tea -s 'be kind'\none")
    nb.run("%%infer -q -c tea\ntwo")
    assert [m["role"] for m in asked(fake).messages or ()] == ["system", "user", "assistant", "user"]
    nb.run("%infer -q --chat other")
    nb.run("%%infer -q -c tea --new\nthree")
    assert [m["content"] for m in asked(fake).messages or ()] == ["three"]
    nb.run("%nbinfer reset tea")
    nb.run("%%infer -q -c tea\nfour")
    assert len(asked(fake).messages or ()) == 1


def test_a_conversation_keeps_its_system_prompt(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("%%infer -q -c tea -s kind\none")
    nb.run("%%infer -q -c tea -s kind\ntwo")
    with pytest.raises(UsageError, match="--new"):
        nb.run("%%infer -q -c tea -s cruel\nthree")
    with pytest.raises(UsageError, match="Conversations: tea"):
        nb.run("%nbinfer reset coffee")


def test_a_turn_that_failed_is_not_part_of_the_conversation(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("%%infer -q -c tea\none")
    echo = fake.script
    fake.script = lambda _: ["par", EngineError("boom")]
    with pytest.raises(EngineError):
        nb.run("%%infer -q -c tea\ntwo")
    fake.script = echo
    nb.run("%%infer -q -c tea\nthree")
    assert [m["content"] for m in asked(fake).messages or ()] == ["one", "one", "three"]


# -- when it goes wrong -------------------------------------------------------------------------------------


def test_a_failing_engine_raises_shows_and_binds_what_there_is(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = lambda _: ["half an ", "answer", EngineError("the <device> is gone")]
    with pytest.raises(EngineError):
        nb.run("%%infer -o r\ngo")
    result = nb["r"]
    assert (result.text, result.finish_reason, result.error) == (
        "half an answer",
        "error",
        "the <device> is gone",
    )
    assert "half an answer" in nb.texts[-1]
    assert "failed: the &lt;device&gt; is gone" in nb.outputs[-1]["data"]["text/html"]
    assert capsys.readouterr().out.strip() == "EngineError: the <device> is gone"
    fake.script = ["fine"]
    assert nb.run("%infer go").text == "fine"


def test_an_interrupt_stops_the_engine_and_keeps_the_part(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(_: CompletionRequest) -> Iterator[Any]:
        yield "so "
        yield "far"
        yield 0.3  # until it has been read
        os.kill(os.getpid(), signal.SIGINT)
        yield HANG

    fake.script = script
    with pytest.raises(KeyboardInterrupt):
        nb.run("%%infer -o r\ngo")
    assert (nb["r"].text, nb["r"].finish_reason) == ("so far", "interrupted")
    assert nb.texts[-1].startswith("so far\n[interrupted")
    assert fake.cancelled == 1
    shown = capsys.readouterr().out.strip()
    assert shown.startswith("KeyboardInterrupt: the answer was stopped")
    assert shown.count("\n") == 0
    fake.script = ["next"]
    assert nb.run("%infer go").text == "next"


@pytest.mark.parametrize(
    "while_in", ["nbinfer.session.TextStream.partial", "nbinfer.display.sinks.result_bundle"]
)
def test_a_second_interrupt_does_not_cost_the_part(
    nb: Notebook,
    fake: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    while_in: str,
) -> None:
    presses = []

    def press() -> None:
        presses.append(1)
        os.kill(os.getpid(), signal.SIGINT)

    def script(_: CompletionRequest) -> Iterator[Any]:
        yield "so far"
        yield 0.3  # until it has been read
        press()
        yield HANG

    original = pkgutil.resolve_name(while_in)

    def pressed_again(*words: Any, **options: Any) -> Any:
        if presses:
            press()
        return original(*words, **options)

    monkeypatch.setattr(while_in, pressed_again)
    fake.script = script
    with pytest.raises(KeyboardInterrupt):
        nb.run("%%infer -o r\ngo")
    assert len(presses) > 1
    assert (nb["r"].text, nb["r"].finish_reason) == ("so far", "interrupted")
    assert nb.texts[-1].startswith("so far\n[interrupted")
    assert capsys.readouterr().out.strip().count("\n") == 0


def test_a_partial_result_shows_itself_in_the_next_cell(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = lambda _: ["half", EngineError("boom")]
    with pytest.raises(EngineError):
        nb.run("%%infer -o r\ngo")
    capsys.readouterr()
    nb.run("r")
    assert "half\n[failed: boom]" in capsys.readouterr().out


def test_a_request_that_cannot_run_binds_its_error(nb: Notebook, fake: FakeEngine) -> None:
    with pytest.raises(RequestError):
        nb.run("%%infer -o r -t 9\ngo")
    assert (nb["r"].text, nb["r"].finish_reason) == ("", "error")
    assert "temperature" in nb["r"].error
    assert nb.outputs == []  # the error itself says it all


def test_an_answer_that_misses_its_schema_keeps_its_text(nb: Notebook, fake: FakeEngine) -> None:
    nb.set(Person=Person)
    fake.script = ['{"name": ', '"A']
    with pytest.raises(ValueError, match="schema"):
        nb.run("%%infer -o r --schema Person\ngo")
    assert (nb["r"].text, nb["r"].parsed, nb["r"].finish_reason) == ('{"name": "A', None, "error")


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("%infer --temprature 1 x", ["UsageError", "--temperature"]),
        ("%infer", ["UsageError", "no prompt", "%infer [options]"]),
        ("%%infer\n ", ["UsageError", "no prompt"]),
        ("%%infer\n{{ persn }}", ["UsageError", "Did you mean person", "--raw"]),
        ("%infer -m fak x", ["ModelNotFound", "fake"]),
        ("%infer --schema Persn x", ["UsageError", "Did you mean Person"]),
        ("%infer --schema shop.Order x", ["UsageError", "shop"]),
        ("%infer --schema person.Order x", ["UsageError", "no attribute 'Order'"]),
        ("%infer --schema missing.json x", ["UsageError", "missing.json", "No such file"]),
        ("%infer --grammar missing.gbnf x", ["UsageError", "missing.gbnf", "No such file"]),
        ("%infer --image missing.png x", ["UsageError", "missing.png"]),
        ("%infer --system-var nope x", ["UsageError", "nope"]),
        ("%infer --choices lables x", ["UsageError", "lables", "a,b", "Did you mean labels"]),
        ("%infer --choices person x", ["UsageError", "person", "holds a list"]),
        ("%infer --choices number x", ["UsageError", "number", "holds a list"]),
        ("%infer -t 9 x", ["RequestError", "between 0 and 5"]),
        ("%infer -p tempreature=1 x", ["RequestError", "temperature"]),
        ("%infer --json --regex x x", ["RequestError", "cannot be combined"]),
        ("%nbinfer laod x", ["UsageError", "Did you mean load"]),
        ("%nbinfer load missing.gguf", ["ModelNotFound", "missing.gguf"]),
        ("%nbinfer load --mod x y", ["UsageError", "--mode"]),
        ("%nbinfer unload nope", ["ModelNotFound", "fake"]),
        ("%nbinfer alias nope", ["ModelNotFound", "%nbinfer alias nope REF"]),
    ],
)
def test_a_mistake_is_at_most_five_lines_and_names_the_fix(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str], cell: str, parts: list[str]
) -> None:
    nb.set(person="x", Person=Person, labels=["a", "b"], number=5)
    capsys.readouterr()
    with pytest.raises((UsageError, Exception)):
        nb.run(cell)
    shown = "".join(capsys.readouterr()).strip()
    assert all(part in shown for part in parts), shown
    assert len(shown.splitlines()) <= 5
    assert fake.requests == []


def test_full_tracebacks_on_request(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    nb.run("%config NbInfer.full_tracebacks = True")
    with pytest.raises(RequestError):
        nb.run("%infer -t 9 x")
    assert "requests.py" in capsys.readouterr().out
    nb.run("%config NbInfer.full_tracebacks = False")
    with pytest.raises(RequestError):
        nb.run("%infer -t 9 x")
    assert "requests.py" not in capsys.readouterr().out


@pytest.mark.parametrize("full", [False, True])
def test_an_error_hands_no_control_character_to_the_terminal(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str], full: bool
) -> None:
    fake.script = lambda _: [EngineError("\x1b]0;title\x07 \x9b2J\nline two")]
    nb.run(f"%config NbInfer.full_tracebacks = {full}")
    try:
        for cell in ("%infer -q go", "import nbinfer; nbinfer.infer('go')"):
            capsys.readouterr()
            with pytest.raises(EngineError) as caught:
                nb.run(cell)
            shown = capsys.readouterr().out
            assert "\u241b]0;title\u2407 \ufffd2J\nline two" in shown
            assert not set("\x1b\x07\x9b") & set(shown)
            assert "\x1b" in str(caught.value)  # a program that reads it gets it as it is
    finally:
        nb.run("%config NbInfer.full_tracebacks = False")


def test_an_error_in_plain_python_names_the_callers_line(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestError):
        nb.run("import nbinfer\n\ndef f():\n    return nbinfer.infer('x', temperature=9)\n\nf()")
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[0].startswith("RequestError: temperature=9")
    assert shown[-1] == "  line 4: return nbinfer.infer('x', temperature=9)"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("nbinfer.infer('x')", "the answer was stopped."),
        ("list(nbinfer.stream('x'))", "the answer was stopped."),
        ("model.embed('x')", "the request was stopped."),
        ("nbinfer.complete(['x'])", "finished rows are kept"),
    ],
)
@pytest.mark.usefixtures("results_folder")
def test_an_interrupt_in_plain_python_names_the_callers_line(
    nb: Notebook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str, words: str
) -> None:
    engine = FakeEngine(lambda _: [HANG])
    nb.set(model=nb.add(engine))
    submit, silent = engine.submit, Stream()

    def submit_then_press(request: Any) -> Any:
        stream = submit(request)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        # An embedding would be there at once; nothing answers on this stream.
        return silent if isinstance(request, EmbeddingRequest) else stream

    monkeypatch.setattr(engine, "submit", submit_then_press)
    with pytest.raises(KeyboardInterrupt):
        nb.run(f"import nbinfer\n\ndef f():\n    return {call}\n\nf()")
    silent.fail(KeyboardInterrupt())  # whoever looks at what is running later finds nothing of this test
    first, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("KeyboardInterrupt: ")
    assert words in first
    assert last == f"  line 4: return {call}"


# -- rows ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("results_folder")
def test_a_frame_is_asked_row_by_row(nb: Notebook, fake: FakeEngine) -> None:
    nb.set(df=pd.DataFrame({"t": ["a", "b"], "u": [1, 2]}, index=["x", "y"]), n=3, tricky="{u}")
    frame = nb.run("%%infer --over df -o out\n{t} {u} {{ n }} {{ tricky }}")
    assert list(frame["completion"]) == ["a 1 3 {u}", "b 2 3 {u}"]
    assert list(frame.index) == ["x", "y"]
    assert nb["out"] is frame


@pytest.mark.usefixtures("results_folder")
@pytest.mark.parametrize(
    ("line", "body", "answers"),
    [
        ("--over df.t", "Say:", ["Say:\n\na", "Say:\n\nb"]),
        ("--over df.t", "{t}!", ["a!", "b!"]),
        ("--over df.t -t 0.5 --stop !", "{t}!", ["a", "b"]),
        ("--over items", "{text}?", ["p?", "q?"]),
        ("--over df.t --raw", "{t} {{{{ x }}}}", ["a {{ x }}", "b {{ x }}"]),
    ],
)
def test_columns_lists_and_options_over_rows(
    nb: Notebook, fake: FakeEngine, line: str, body: str, answers: list[str]
) -> None:
    nb.set(df=pd.DataFrame({"t": ["a", "b"]}), items=["p", "q"])
    assert list(nb.run(f"%%infer {line}\n{body}")["completion"]) == answers


@pytest.mark.usefixtures("results_folder")
@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("%%infer --over dff\n{t}", ["there is no variable 'dff'", "df"]),
        ("%%infer --over df\n{tt}", ["'tt'", "'t'"]),
        ("%%infer --over df.nope\nx", ["'nope'", "'t'"]),
        ("%%infer --over df -c\n{t}", ["--chat", "--over"]),
    ],
)
def test_mistakes_over_rows_are_short(
    nb: Notebook, fake: FakeEngine, capsys: pytest.CaptureFixture[str], cell: str, parts: list[str]
) -> None:
    nb.set(df=pd.DataFrame({"t": ["a", "b"]}))
    with pytest.raises((UsageError, RequestError)):
        nb.run(cell)
    shown = "".join(capsys.readouterr()).strip()
    assert all(part in shown for part in parts), shown
    assert len(shown.splitlines()) <= 5


# -- terminal -----------------------------------------------------------------------------------------------


def test_a_terminal_gets_plain_text_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with notebook(terminal=True) as nb:
        nb.add(FakeEngine(lambda _: [Delta("hm", reasoning=True), "one ", "\x1b[2Jtwo"]))
        capsys.readouterr()
        nb.run("%infer go")
        out, err = capsys.readouterr()
    assert out.splitlines()[0] == "one \u241b[2Jtwo"
    assert "fake · 3 tokens" in out
    assert out.count("one") == 1
    assert err.startswith("hm")


def test_a_terminal_shows_how_it_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with notebook(terminal=True) as nb:
        nb.add(FakeEngine(lambda _: ["half", EngineError("boom")]))
        capsys.readouterr()
        with pytest.raises(EngineError):
            nb.run("%infer go")
        out, err = capsys.readouterr()
    assert out.splitlines()[0] == "half"
    assert "[failed: boom]" in err
    assert "EngineError: boom" in out


# -- loading and unloading ----------------------------------------------------------------------------------


def test_loading_prints_nothing_and_unloading_takes_everything_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    with notebook() as nb:
        assert "".join(capsys.readouterr()) == ""
        nb.run("%reload_ext nbinfer")
        shell = nb.shell
        assert {"infer", "nbinfer"} <= set(shell.magics_manager.magics["line"])
        assert len(shell.Completer.custom_matchers) == 1
        nb.run("%unload_ext nbinfer")
        assert not {"infer", "nbinfer"} & set(shell.magics_manager.magics["line"])
        assert not {"infer"} & set(shell.magics_manager.magics["cell"])
        assert shell.Completer.custom_matchers == []
        assert [type(c).__name__ for c in shell.configurables].count("NbInfer") == 0
        assert "QuestionMark" not in str(shell.input_transformer_manager.token_transformers)
        nb.run("%load_ext nbinfer")
    assert not InteractiveShell.initialized()


def test_metadata_survives_json(nb: Notebook, fake: FakeEngine) -> None:
    nb.run("%infer --seed 3 hello")
    kept = json.loads(json.dumps(nb.outputs[-1]["metadata"]))["nbinfer"]
    assert (kept["seed"], kept["finish_reason"]) == (3, "stop")
