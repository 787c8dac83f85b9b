"""Frames in a real kernel: one live display, an interrupt that keeps rows, work in the background."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.kernel import WITH_FAKE, Kernel, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("f")
    with kernel(folder) as started:
        started.run(f"import os; os.environ['NBINFER_CACHE'] = {str(folder / 'cache')!r}")
        ran = started.run(WITH_FAKE + "import nbinfer as nb\nfrom support.fake_engine import echo")
        assert ran.reply["status"] == "ok", ran.error_text
        yield started


@pytest.fixture
def nb(shared: Kernel) -> Kernel:
    shared.run("engine.script = echo; nb.cache.clear(); engine.requests.clear()")
    return shared


def test_progress_is_one_display_that_is_updated(nb: Kernel) -> None:
    nb.run("engine.script = lambda request: [0.05, *echo(request)]")
    ran = nb.run("out = nb.complete([f'row {i}' for i in range(60)])")
    assert ran.reply["status"] == "ok", ran.error_text
    assert len(ran.of("display_data")) == 1
    assert len(ran.of("update_display_data")) >= 1
    assert "complete 60/60 rows done" in ran.shown[-1]
    html = ran.of("update_display_data")[-1]["data"]["text/html"]
    assert 'value="60"' in html
    assert (ran.printed, ran.of("execute_result")) == ("", [])
    identities = {c["transient"]["display_id"] for c in ran.of("display_data", "update_display_data")}
    assert len(identities) == 1


def test_an_interrupt_keeps_finished_rows_and_the_next_run_goes_on(nb: Kernel) -> None:
    nb.run(
        "def script(request):\n"
        "    return echo(request) if len(engine.requests) and 'quick' in str(request.messages) else [HANG]\n"
        "engine.script = script\n"
        "rows = [f'quick {i}' for i in range(20)] + [f'slow {i}' for i in range(20)]"
    )
    pressed: list[str] = []

    def stop(kind: str, content: dict[str, Any]) -> None:
        if "20/40 rows" in content.get("data", {}).get("text/plain", "") and not pressed:
            pressed.append(kind)
            nb.manager.interrupt_kernel()

    ran = nb.run("out = nb.complete(rows)", on_message=stop)
    assert (ran.reply["status"], ran.reply["ename"]) == ("error", "KeyboardInterrupt")
    assert "20/40 rows cancelled" in ran.shown[-1]
    assert nb.value("nb.last_run().frame()['completion'].notna().sum()") == "np.int64(20)"
    assert nb.value("(engine.load().running, engine.load().waiting)") == "(0, 0)"
    nb.run("engine.script = echo; engine.requests.clear()")
    again = nb.run("out = nb.complete(rows)")
    assert again.reply["status"] == "ok", again.error_text
    assert nb.value("len(engine.requests)") == "20"
    assert nb.value("list(out['completion']) == rows") == "True"


def test_what_a_join_will_cost_is_said_in_its_output(nb: Kernel) -> None:
    setup = nb.run(
        "import pandas as pd\nfrom support.frames import embedding_model\n"
        "session.add(embedding_model(model='vectors'))\n"
        "left, right = pd.DataFrame({'a': ['x', 'y']}), pd.DataFrame({'b': ['x', 'z', 'w']})"
    )
    assert setup.reply["status"] == "ok", setup.error_text
    ran = nb.run("out = nb.join(left, right, left_on='a', right_on='b')")
    assert ran.reply["status"] == "ok", ran.error_text
    assert ran.shown[0] == "nbinfer.join: 2 + 3 embeddings, less what is known already"
    assert ran.of("stream") == []  # standard error is red in a notebook, as if something were wrong


def test_failed_rows_are_summed_up_in_the_display(nb: Kernel) -> None:
    nb.run("bad = ValueError('no')")
    nb.run("engine.script = lambda request: [bad] if 'bad' in str(request.messages) else echo(request)")
    ran = nb.run("out = nb.complete(['a', 'bad', 'c'])")
    assert "1 of 3 rows failed: ValueError 1" in ran.shown[-1]
    assert ran.printed == ""


def test_a_wrong_call_is_an_error_of_a_few_lines(nb: Kernel) -> None:
    ran = nb.run("nb.complete(['a'], 'no field')")
    assert (ran.reply["status"], ran.reply["ename"]) == ("error", "RequestError")
    assert "no field" in ran.error_text


def test_work_in_the_background_leaves_the_kernel_free(nb: Kernel) -> None:
    nb.run(
        "import threading; gate = threading.Event(); engine.script = lambda request: [gate, *echo(request)]"
    )
    ran = nb.run("run = nb.submit(['a', 'b'])")
    assert ran.reply["status"] == "ok", ran.error_text
    assert nb.value("(run.done, len(run.frame()))") == "(False, 2)"
    assert nb.value("gate.set() or list(run.wait()['completion'])") == "['a', 'b']"
    shown = nb.run("run").of("execute_result")[0]["data"]
    assert "2/2 rows done" in shown["text/plain"]
    assert 'value="2"' in shown["text/html"]
