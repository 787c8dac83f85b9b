"""What a person sees in a notebook: a real kernel, a scripted engine, the messages in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.kernel import WITH_FAKE, Kernel, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    # A short path: a socket's name has little room.
    with kernel(tmp_path_factory.mktemp("k")) as started:
        ran = started.run(WITH_FAKE)
        assert ran.reply["status"] == "ok", ran.error_text
        assert (ran.printed, ran.shown) == ("", [])
        yield started


@pytest.fixture
def nb(shared: Kernel) -> Kernel:
    shared.run("engine.script = ['Hello ', '**you**']")
    return shared


def test_the_first_token_is_on_screen_before_the_second_is_there(nb: Kernel, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    nb.run(
        "import time\nfrom pathlib import Path\n"
        "def script(request):\n"
        "    yield 'first '\n"
        f"    while not Path({str(gate)!r}).exists():\n"
        "        yield 0.01\n"
        "    yield 'second'\n"
        "engine.script = script"
    )

    def open_gate(kind: str, content: dict[str, Any]) -> None:
        if kind == "display_data":
            assert content["data"]["text/plain"] == "first "
            gate.touch()

    ran = nb.run("%%infer\ngo", on_message=open_gate)
    assert ran.reply["status"] == "ok"
    assert len(ran.of("display_data")) == 1
    assert ran.shown[-1] == "first second"
    assert ran.of("execute_result") == []


def test_an_interrupt_keeps_the_part_and_the_next_cell_works(nb: Kernel) -> None:
    nb.run("def script(request):\n    yield 'so '\n    yield 'far'\n    yield HANG\nengine.script = script")
    pressed: list[str] = []

    def stop(kind: str, content: dict[str, Any]) -> None:
        if "so far" in content.get("data", {}).get("text/plain", "") and not pressed:
            pressed.append(kind)
            nb.manager.interrupt_kernel()

    ran = nb.run("%%infer -o part\ngo", on_message=stop)
    assert (ran.reply["status"], ran.reply["ename"]) == ("error", "KeyboardInterrupt")
    assert len(ran.error_text.splitlines()) == 1
    assert ran.shown[-1].startswith("so far\n[interrupted")
    assert "interrupted" in ran.of("update_display_data")[-1]["data"]["text/html"]
    assert nb.value("(part.text, part.finish_reason, engine.cancelled)") == "('so far', 'interrupted', 1)"
    assert nb.value("engine.load().running") == "0"
    nb.run("engine.script = ['fine']")
    assert nb.run("%infer go").shown[-1] == "fine"


def test_an_interrupt_before_the_first_token_is_heard(nb: Kernel) -> None:
    nb.run("engine.script = lambda request: [HANG]")

    def stop(kind: str, content: dict[str, Any]) -> None:
        if kind == "stream" and "waiting" in content["text"]:
            nb.manager.interrupt_kernel()

    ran = nb.run(
        "import threading\n"
        "threading.Timer(0.3, lambda: print('waiting', flush=True)).start()\n"
        "%infer -o part go",
        on_message=stop,
    )
    assert ran.reply["ename"] == "KeyboardInterrupt"
    assert nb.value("(part.text, part.finish_reason)") == "('', 'interrupted')"


def test_a_result_is_shown_once_and_is_the_cells_value(nb: Kernel) -> None:
    ran = nb.run("%infer -o bound hi")
    assert ran.of("execute_result") == []
    assert ran.shown[-1] == "Hello **you**"
    assert ran.of("update_display_data")[-1]["metadata"]["nbinfer"]["finish_reason"] == "stop"
    number = ran.reply["execution_count"]
    assert nb.value(f"(_ is bound, Out[{number}] is bound)") == "(True, True)"
    (again,) = nb.run("bound").of("execute_result")
    assert "Hello <strong>you</strong>" in again["data"]["text/html"]
    assert set(again["data"]) == {"text/plain", "text/html"}
    assert nb.run("x = %infer hi").of("execute_result") == []
    assert len(nb.run("x").of("execute_result")) == 1
    quiet = nb.run("%infer -q hi")
    assert (quiet.shown, quiet.of("execute_result")) == ([], [])


def test_a_line_that_ends_in_a_question_mark_asks_the_model(nb: Kernel) -> None:
    nb.run("%infer -q Where is Paris?")
    assert nb.value("engine.requests[-1].messages[-1]['content']") == "'Where is Paris?'"
    ran = nb.run("%infer?")
    assert "--temperature" in ran.reply["payload"][0]["data"]["text/plain"]


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("%infer --temprature 1 x", ["UsageError", "Did you mean --temperature"]),
        ("%%infer\nabout {{ enigne }}", ["UsageError", "Did you mean engine", "--raw"]),
        ("%nbinfer load missing.gguf", ["ModelNotFound", "missing.gguf"]),
        ("%nbinfer load corrupt.gguf", ["GGUFParseError", "corrupt.gguf"]),
        ("%infer --grammar missing.lark x", ["UsageError", "missing.lark"]),
        ("%infer -m nope x", ["ModelNotFound", "Loaded: fake"]),
        (
            "import nbinfer\nnbinfer.infer('x', temperature=9)",
            ["RequestError", "between 0 and 5", "line 2: nbinfer.infer"],
        ),
    ],
)
def test_a_mistake_is_at_most_five_lines_and_names_the_fix(nb: Kernel, cell: str, parts: list[str]) -> None:
    nb.run("from pathlib import Path\nPath('corrupt.gguf').write_bytes(b'GGUF' + b'x' * 100)")
    ran = nb.run(cell)
    # What papermill, nbclient and nbmake go by.
    assert ran.reply["status"] == "error"
    assert all(part in ran.error_text for part in parts), ran.error_text
    assert len(ran.error_text.splitlines()) <= 5
    assert nb.run("%infer go").reply["status"] == "ok"


@pytest.mark.parametrize(
    ("cell", "offered"),
    [
        ("%infer --tem", ["--temperature"]),
        ("%%infer --dry", ["--dry-run"]),
        ("%%infer fa", ["fake"]),
        ("%%infer sho", ["short"]),
        ("%infer -m fa", ["fake"]),
        ("%infer --schema Ci", ["City"]),
        ("%infer --over cit", ["cities"]),
        ("%infer --image pict", ["picture.png"]),
        ("%%infer\nabout {{ engi", ["engine"]),
        ("%%infer\n{{ cities.na", ["cities.name"]),
        ("%nbinfer esti", ["estimate"]),
        ("%nbinfer load sho", ["short"]),
        ("%nbinfer load folder/", ["folder/model.gguf"]),
    ],
)
def test_completion_reaches_the_front_end(nb: Kernel, cell: str, offered: list[str]) -> None:
    nb.run(
        "import pandas as pd\nfrom pathlib import Path\nPath('folder').mkdir(exist_ok=True)\n"
        "Path('folder/model.gguf').touch()\nPath('picture.png').touch()\n"
        "City = dict\ncities = pd.DataFrame({'name': ['x']})\n%nbinfer alias short fake"
    )
    assert nb.complete(cell) == offered


def test_output_is_updated_at_most_twelve_times_a_second(nb: Kernel) -> None:
    nb.run("engine.script = lambda request: ['word '] * 400")
    # However fast the engine is: the first token, what came meanwhile, the end.
    ran = nb.run(
        "from time import perf_counter\nbegan = perf_counter()\n%infer go\nseconds = perf_counter() - began"
    )
    seconds = float(nb.value("seconds"))
    assert len(ran.shown) <= 12 * seconds + 2
    assert ran.shown[-1] == "word " * 400


def test_hostile_text_is_never_handed_over_as_markdown(nb: Kernel) -> None:
    nb.run("engine.script = ['<script>window.__pwn=1</script> ', '![x](https://evil.example/)']")
    ran = nb.run("%infer go")
    for content in ran.of("display_data", "update_display_data"):
        assert set(content["data"]) == {"text/plain", "text/html"}
        assert "<script" not in content["data"]["text/html"]
        assert "<img" not in content["data"]["text/html"]
