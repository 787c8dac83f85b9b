"""Who lives how long: kernels die, runners and services are killed, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support.sidecar import names, processes, until

from nbinfer import session
from nbinfer.contract.errors import EngineError, ModelLoadError, NbinferError
from nbinfer.contract.requests import CompletionRequest, Sampling
from nbinfer.contract.results import Delta
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nbinfer.backends.process import RunControl

pytestmark = pytest.mark.engine

LOAD = (
    "import nbinfer.session as s; "
    "m = s.load('demo', where='sidecar', threads=1, context_size=512, keep_alive={!r})"
)


# -- a kernel that dies ---------------------------------------------------------------------------------


@pytest.fixture
def kernel(runtime: Path) -> Iterator[Any]:
    """A real Jupyter kernel, with its manager and a client: (manager, run)."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")

    def run(code: str, timeout: float = 60) -> str:
        reply = client.execute_interactive(
            code, timeout=timeout, store_history=False, output_hook=lambda message: seen.append(message)
        )
        assert reply["content"]["status"] == "ok", reply["content"].get("traceback")
        return "".join(m["content"]["text"] for m in seen if m["msg_type"] == "stream")

    seen: list[Any] = []
    yield manager, run, client
    client.stop_channels()
    if manager.is_alive():
        manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


def interrupt(manager: Any, client: Any) -> None:
    manager.interrupt_kernel()


def shut_down(manager: Any, client: Any) -> None:
    manager.shutdown_kernel()


def shut_down_now(manager: Any, client: Any) -> None:
    manager.shutdown_kernel(now=True)


def restart(manager: Any, client: Any) -> None:
    manager.restart_kernel()
    client.wait_for_ready(timeout=60)


def kill_alone(manager: Any, client: Any) -> None:
    os.kill(manager.provisioner.pid, signal.SIGKILL)


def leave(manager: Any, client: Any) -> None:
    # What a kernel does when the server that started it is gone.
    client.execute("import os; os._exit(1)")


DEATHS = [shut_down, shut_down_now, restart, kill_alone, leave]


@pytest.mark.kernel
@pytest.mark.parametrize("death", DEATHS)
def test_a_private_model_goes_with_its_kernel(kernel: Any, runtime: Path, death: Any) -> None:
    manager, run, client = kernel
    run(LOAD.format("0") + "; print(m.infer('Hello', max_tokens=3))")
    assert len(processes(runtime)) == 2, "the service and one runner"
    death(manager, client)
    until(lambda: not processes(runtime) and not names(runtime), 3, "nothing is left")


@pytest.mark.kernel
@pytest.mark.parametrize("death", DEATHS)
def test_a_shared_model_outlives_its_kernel_and_the_next_one_needs_no_load(
    kernel: Any, runtime: Path, death: Any
) -> None:
    manager, run, client = kernel
    run(LOAD.format("5m"))
    before = {process.pid for process in processes(runtime)}
    death(manager, client)
    time.sleep(1)
    assert {process.pid for process in processes(runtime)} == before
    model = session.load("demo", where="sidecar", threads=1, context_size=512, keep_alive="0")
    hold = model.engine.hold  # type: ignore[attr-defined]
    assert hold.already
    assert model.load_seconds < 1
    assert model.infer("Hello", max_tokens=3).text
    assert {process.pid for process in processes(runtime)} == before


@pytest.mark.kernel
def test_an_interrupted_cell_leaves_the_sidecar_alone_and_stops_its_answer(
    kernel: Any, runtime: Path
) -> None:
    manager, run, client = kernel
    run(LOAD.format("0"))
    pids = {process.pid for process in processes(runtime)}
    # Long enough that it cannot be over: without its ends, and again and again.
    asked = client.execute("while True: m.infer('Tell me a story.', max_tokens=400)")
    until(lambda: _busy() == 1, what="the cell asks the model")
    interrupt(manager, client)
    until(lambda: _busy() == 0, 5, "the answer stops")
    reply = client.get_shell_msg(timeout=30)
    while reply["parent_header"]["msg_id"] != asked:
        reply = client.get_shell_msg(timeout=30)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    run("print(m.infer('Hello', max_tokens=3))")
    assert {process.pid for process in processes(runtime)} == pids


def _busy() -> int:
    found = discovery.describe()
    return 0 if found is None else sum(each["busy"] for each in found["models"])


def test_a_forked_child_does_not_keep_its_dead_parents_model(runtime: Path) -> None:
    code = (
        LOAD.format("0")
        + "; import os, time\nif os.fork() == 0:\n    time.sleep(60)\nprint('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        parent.kill()
        parent.wait()
        try:
            until(lambda: not processes(runtime), 3, "nothing is left")
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_forked_child_asks_for_itself_and_its_parent_goes_on(runtime: Path) -> None:
    code = (
        LOAD.format("0")
        + """
import os
print(m.infer("What is the capital of Italy?").text, flush=True)
for _ in range(2):
    if (child := os.fork()) == 0:
        print(m.infer("What is the capital of Peru?").text, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
print(m.infer("What is the capital of France?").text, flush=True)
"""
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    peru = "The capital of Peru is Lima."
    assert done.stdout.splitlines() == [
        "The capital of Italy is Rome.", peru, peru, "The capital of France is Paris."
    ]  # fmt: skip


def test_a_forked_child_that_unloads_leaves_its_parents_model(runtime: Path) -> None:
    code = (
        LOAD.format("0")
        + """
import os
runner = m.engine.hold.pid
if (child := os.fork()) == 0:
    m.unload()
    os._exit(0)
os.waitpid(child, 0)
print(m.infer("What is the capital of France?").text, m.engine.hold.pid == runner, flush=True)
"""
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "The capital of France is Paris. True\n"


def test_one_model_under_two_names_is_one_process(runtime: Path) -> None:
    models = [session.load("demo", where="sidecar", name=name, keep_alive=0) for name in ("one", "two")]
    answers = [model.infer("What is the capital of Peru?") for model in models]
    assert [answer.text for answer in answers] == ["The capital of Peru is Lima."] * 2
    assert [answer.model for answer in answers] == ["one", "two"]
    engines: list[Any] = [model.engine for model in models]
    assert len({engine.hold.pid for engine in engines}) == 1


# -- starting ------------------------------------------------------------------------------------------


def test_kernels_that_race_start_one_sidecar_and_load_once(runtime: Path) -> None:
    code = (
        LOAD.format("5m")
        + "; print(m.engine.hold.service.pid, m.engine.hold.pid, m.infer('Hi', max_tokens=2).text)"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {racer.communicate(timeout=90)[0] for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert len(said) == 1, "all of them say the same processes and the same text"
    assert len(processes(runtime)) == 2


def test_files_of_a_killed_sidecar_do_not_stop_the_next_one(runtime: Path) -> None:
    session.load("demo", where="sidecar", threads=1, context_size=512).unload()
    old = discovery.find()
    assert old is not None
    session.load("demo", where="sidecar", threads=1, context_size=512)
    psutil.Process(old.pid).kill()
    until(lambda: not processes(runtime), 4, "the runners end with their supervisor")
    assert discovery.stale_files()
    model = session.load("demo", where="sidecar", name="again", threads=1, context_size=512, keep_alive="0")
    assert model.infer("Hello", max_tokens=3).text
    assert not discovery.stale_files()


def test_the_doctor_tells_the_sidecar_its_models_and_what_lies_about(runtime: Path) -> None:
    from nbinfer.sidecar.commands import checkup

    assert [row["status"] for row in checkup()] == ["ok"]
    session.load("demo", where="sidecar", threads=1, context_size=256, keep_alive="0")
    found = {row["what"]: row["detail"] for row in checkup()}
    assert "held by 1 kernel" in found["sidecar"]
    assert "completion, ready" in found["sidecar model demo"]
    service = discovery.find()
    assert service is not None
    os.kill(service.pid, signal.SIGKILL)
    until(lambda: not processes(runtime), 4)
    assert [row["what"] for row in checkup()][1:] == ["stale file"] * len(discovery.stale_files())
    assert discovery.stale_files()
    assert discovery.stop() is False
    discovery.remove_stale_sockets()


def test_a_file_that_lies_about_a_process_is_not_believed(runtime: Path) -> None:
    # A pid that was given to another program since: it must be neither used nor killed.
    lie = {"socket": str(runtime / "sidecar-1.sock"), "pid": os.getpid(), "created": 1.0, "version": "0"}
    (runtime / "sidecar.json").write_text(json.dumps(lie))
    assert discovery.find() is None
    assert discovery.stop() is False
    assert not (runtime / "sidecar.json").exists()


def test_a_model_that_cannot_be_loaded_says_why_and_leaves_nothing(runtime: Path, tmp_path: Path) -> None:
    from nbinfer.models.demo import demo_path

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_path().read_bytes()[:600_000])
    with pytest.raises(NbinferError) as caught:
        session.load(cut, where="sidecar", keep_alive="0")
    assert not isinstance(caught.value, EngineError)
    until(lambda: not processes(runtime) and not names(runtime), 5, "nothing is left")


def test_an_unknown_option_is_refused_as_in_the_kernel(runtime: Path) -> None:
    with pytest.raises(NbinferError, match="no option 'nonsense'"):
        session.load("demo", where="sidecar", nonsense=1, keep_alive="0")


# -- killed while they work ----------------------------------------------------------------------------


def endless(model: session.Model) -> CompletionRequest:
    from support.demo_engine import open_demo

    engine = open_demo(context_size=64)
    ends = sorted(engine._weights.end_tokens)
    engine.close()
    return CompletionRequest(
        messages=({"role": "user", "content": "Tell me a story."},),
        sampling=Sampling(logit_bias=dict.fromkeys(ends, -100.0)),
    )


def test_a_killed_runner_fails_its_requests_at_once_and_nobody_elses(runtime: Path) -> None:
    one = session.load("demo", where="sidecar", name="one", threads=1, context_size=1024, keep_alive="0")
    other = session.load("demo", where="sidecar", name="other", threads=1, context_size=512, keep_alive="0")
    request = endless(one)
    killed = threading.Event()
    outcome: list[Any] = []

    def read() -> None:
        stream = one.submit(request)
        try:
            for event in stream:
                if isinstance(event, Delta) and not killed.is_set():
                    os.kill(one.engine.hold.pid, signal.SIGKILL)  # type: ignore[attr-defined]
                    killed.set()
        except NbinferError as error:
            outcome.append((error, time.monotonic()))

    steady = other.submit(endless(other))
    reader = threading.Thread(target=read)
    reader.start()
    assert killed.wait(30)
    began = time.monotonic()
    reader.join(30)
    error, at = outcome[0]
    assert isinstance(error, EngineError)
    assert "SIGKILL" in str(error)
    assert len(str(error).splitlines()) <= 5
    assert at - began < 2
    assert one.infer("Hello", max_tokens=3).text, "the next request has it loaded again"
    assert steady.result(60).finish_reason in ("length", "stop"), "the other one never noticed"


def test_a_request_that_showed_nothing_yet_is_repeated_once(runtime: Path) -> None:
    model = session.load("demo", where="sidecar", threads=1, context_size=512, keep_alive="0")
    pid = model.engine.hold.pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGSTOP)
    stream = model.stream("What is the capital of France?")
    until(lambda: _busy() == 1)
    os.kill(pid, signal.SIGKILL)
    assert stream.result().text == "The capital of France is Paris."


def test_a_killed_service_takes_its_runners_along_and_the_next_request_starts_another(runtime: Path) -> None:
    model = session.load("demo", where="sidecar", threads=1, context_size=512, keep_alive="0")
    old = model.engine.hold.service.pid  # type: ignore[attr-defined]
    os.kill(old, signal.SIGKILL)
    until(lambda: not processes(runtime), 3, "the runner ends with the service")
    assert model.infer("What is the capital of France?").text == "The capital of France is Paris."
    found = discovery.find()
    assert found is not None
    assert found.pid != old


@pytest.mark.parametrize("hang", [False, True])
def test_stop_ends_everything_also_a_runner_that_hangs(runtime: Path, hang: bool) -> None:
    model = session.load("demo", where="sidecar", threads=1, context_size=512, keep_alive="-1")
    if hang:
        os.kill(model.engine.hold.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
    assert discovery.stop(timeout=30)
    assert not processes(runtime)
    assert names(runtime) == []
    assert discovery.stop() is False


# -- keep-alive and room -------------------------------------------------------------------------------


def test_an_idle_model_stays_for_its_keep_alive_and_then_the_sidecar_goes(runtime: Path) -> None:
    model = session.load("demo", where="sidecar", threads=1, context_size=512, keep_alive="700ms")
    session.session.forget(model)
    model.engine.hold.close()  # type: ignore[attr-defined]
    time.sleep(0.3)
    assert len(processes(runtime)) == 2
    until(lambda: not processes(runtime) and not names(runtime), 5, "all of it goes")


def test_unloading_leaves_a_model_that_another_kernel_holds(runtime: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOAD.format("0") + "; print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        mine = session.load("demo", where="sidecar", threads=1, context_size=512, keep_alive="0")
        assert mine.engine.hold.already  # type: ignore[attr-defined]
        mine.unload()
        time.sleep(0.5)
        assert len(processes(runtime)) == 2
        other.communicate(b"\n")
    until(lambda: not processes(runtime), 3, "the last one took it along")


def test_a_crash_during_the_load_is_a_load_error(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbinfer import backends
    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.modes import Mode
    from nbinfer.models.demo import demo_path
    from nbinfer.sidecar.loader import Progress, Wanted
    from nbinfer.sidecar.runners import Recipe, start

    progress = Progress()

    def kill(control: RunControl) -> None:
        until(lambda: control.pid is not None)
        os.kill(control.pid or 0, signal.SIGABRT)

    run = backends.get("llamacpp").run

    def doomed(*arguments: Any, control: RunControl) -> None:
        threading.Thread(target=kill, args=(control,)).start()
        run(*arguments, control=control)

    monkeypatch.setattr(
        type(backends.get("llamacpp")), "run", lambda self, *a, control: doomed(*a, control=control)
    )
    recipe = Recipe(
        backend="llamacpp", path=demo_path(), name="demo", mode=Mode.COMPLETION, config=ModelConfig()
    )
    with pytest.raises(ModelLoadError, match="SIGABRT"):
        start(Wanted(key=1, name="demo", detail=recipe), progress, lambda _: None)
    assert list(runtime.glob("crash-*.log"))
