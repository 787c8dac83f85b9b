"""Processes: started apart, stopped whole, explained when they crash."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support.sidecar import until

from nbinfer.backends import process
from nbinfer.backends.crash import exit_words, explain
from nbinfer.backends.llamacpp import flag_options
from nbinfer.backends.process import LogTail, RunControl, supervise
from nbinfer.contract import errors
from nbinfer.contract.errors import ConfigError, ContextOverflow, NbinferError, SchemaError
from nbinfer.contract.memory import RequiredMemory
from nbinfer.engines.remote.wire import RunnerLost, Unreachable, error_from_json, error_to_json
from nbinfer.sidecar.commands import parse_bytes
from nbinfer.sidecar.sizes import RUNNER_BYTES, bound, runner_size

if TYPE_CHECKING:
    from pathlib import Path


class Run:
    """A supervised child on a thread."""

    def __init__(self, code: str) -> None:
        self.control = RunControl()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(code,))
        self.thread.start()
        until(lambda: "up" in self.control.log.text() or not self.thread.is_alive())

    def _run(self, code: str) -> None:
        try:
            supervise(
                [sys.executable, "-c", f"import os, signal, sys, time\n{code}"], self.control, what="it"
            )
        except NbinferError as error:
            self.error = error

    def stop(self) -> None:
        self.control.cancel()
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", ((signal.SIGINT, 0.2), (signal.SIGTERM, 0.2)))


@pytest.mark.parametrize(
    "ignored", ["", "signal.SIGINT", "signal.SIGINT, signal.SIGTERM"], ids=["polite", "int", "int and term"]
)
def test_a_child_is_asked_twice_and_then_killed(short: None, ignored: str) -> None:
    code = f"""
for number in [{ignored}]: signal.signal(number, signal.SIG_IGN)
print('up', flush=True)
time.sleep(60)
"""
    run = Run(code)
    run.stop()
    assert run.error is None, "a cancelled run is no error"
    assert not psutil.pid_exists(run.control.pid or 0)


def test_what_the_child_started_ends_with_it(short: None) -> None:
    code = """
import subprocess
near = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
far = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(near.pid, far.pid, "up", flush=True)
time.sleep(60)
"""
    run = Run(code)
    pids = [int(word) for word in run.control.log.text().split()[:2]]
    run.stop()
    until(lambda: not any(_runs(pid) for pid in pids), 5)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def test_what_a_crashed_child_started_ends_too(short: None) -> None:
    code = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, "up", flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
"""
    run = Run(code)
    run.thread.join(30)
    assert isinstance(run.error, RunnerLost)
    pid = int(run.control.log.text().split()[0])
    until(lambda: not _runs(pid), 5)


def test_a_child_has_a_session_of_its_own(short: None) -> None:
    run = Run("print('up', flush=True)\ntime.sleep(60)")
    pid = run.control.pid or 0
    assert os.getsid(pid) == os.getpgid(pid) == pid
    run.stop()


def test_the_input_ends_when_the_supervisor_does(tmp_path: Path) -> None:
    import subprocess

    code = f"""
import sys, threading
from nbinfer.backends.process import RunControl, supervise
child = "import os; print(os.getpid(), flush=True); os.read(0, 1); open({str(tmp_path / "ended")!r}, 'w')"
control = RunControl()
command = [sys.executable, "-c", child]
threading.Thread(target=supervise, args=(command, control), kwargs=dict(what="x")).start()
while not control.log.text(): pass
print("up", flush=True)
threading.Event().wait()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"up\n"
        supervisor.kill()
    until(lambda: (tmp_path / "ended").exists(), 10)


def test_output_without_line_ends_does_not_stop_the_child(short: None) -> None:
    # A progress bar writes a megabyte with no newline; the pipe must not fill up.
    run = Run("sys.stdout.write('x' * 2_000_000); sys.stdout.flush(); print('up', flush=True); os._exit(7)")
    run.thread.join(30)
    assert isinstance(run.error, RunnerLost)
    assert "exit code 7" in str(run.error)
    assert len(run.control.log.text()) >= 64 * 1024
    assert len(run.error.report.log) >= 64 * 1024


def test_a_tail_keeps_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tail = LogTail(100)
    for i in range(1000):
        tail.write(f"line {i}\n".encode())
    assert tail.text().endswith("line 999\n")
    assert len(tail.text()) == 100
    tail.write(b"\xff" * 500)
    assert len(tail.text()) == 100


@pytest.mark.parametrize(
    ("code", "log", "words"),
    [
        (-9, "", ["SIGKILL", "memory"]),
        (-11, "", ["SIGSEGV", "segmentation"]),
        (-4, "", ["SIGILL", "processor"]),
        (-7, "", ["SIGBUS", "file"]),
        (1, "ggml_cuda: cudaMalloc failed: out of memory", ["GPU ran out of memory", "context_size"]),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", ["GPU ran out of memory"]),
        (1, "ggml_metal_buffer_init: error: failed to allocate buffer", ["GPU ran out of memory"]),
        (1, "std::bad_alloc", ["machine ran out of memory"]),
        (1, "error: unknown model architecture: 'qwen99'", ["qwen99", "not known"]),
        (127, "error while loading shared libraries: libcuda.so.1: cannot open", ["libcuda.so.1", "missing"]),
        (1, "OSError: libggml.so: cannot open shared object file: No such file", ["libggml.so"]),
        (1, "ModuleNotFoundError: No module named 'vllm'", ["package vllm"]),
        (1, "CUDA error: no kernel image is available for execution on the device", ["CUDA driver or GPU"]),
        (1, "CUDA driver version is insufficient for CUDA runtime version", ["driver"]),
        (1, "RuntimeError: No CUDA GPUs are available", ["no GPU"]),
        (1, "jinja2.exceptions.TemplateSyntaxError: unexpected '}'", ["chat template is broken"]),
        (1, "tensor 'blk.0.ffn' data is not within the file bounds, model is corrupted", ["incomplete"]),
        (1, "Please pass the argument `trust_remote_code=True`", ["never run"]),
        (1, "OSError: [Errno 98] Address already in use", ["address is taken"]),
        (1, "KeyError: 'x'\nRuntimeError: the last one", ["the last one"]),
        (3, "nothing that is known", ["unexpectedly", "exit code 3"]),
        (137, "", ["exit code 137: signal 9"]),
    ],
)  # fmt: skip
def test_a_crash_is_explained_in_a_line(code: int, log: str, words: list[str]) -> None:
    text = str(explain(code, f"noise\n{log}\n", what="demo"))
    for word in words:
        assert word in text
    assert text.startswith("demo ended")
    assert len(text.splitlines()) <= 3


def test_exit_codes_are_named() -> None:
    assert exit_words(0) == "exit code 0"
    assert exit_words(-15) == "signal 15, SIGTERM"
    assert exit_words(-200) == "signal 200"


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, NbinferError) and kind is not NbinferError
]


@pytest.mark.parametrize("kind", [*KINDS, RunnerLost])
def test_an_error_is_the_same_on_the_other_side(kind: type[NbinferError]) -> None:
    error = kind("what is wrong, and the fix")
    status, body = error_to_json(error)
    back = error_from_json(body, status)
    assert type(back) is kind
    assert str(back) == str(error)
    assert status >= 400


def test_what_an_error_knows_travels_with_it() -> None:
    overflow = error_from_json(error_to_json(ContextOverflow("x", prompt_tokens=9, context_size=5))[1])
    assert isinstance(overflow, ContextOverflow)
    assert (overflow.prompt_tokens, overflow.context_size) == (9, 5)
    schema = error_from_json(error_to_json(SchemaError("x", raw="{"))[1])
    assert isinstance(schema, SchemaError)
    assert schema.raw == "{"


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"error": {"message": "maximum context length is 5"}}, 400, ContextOverflow),
        ({"error": {"message": "x", "code": "context_length_exceeded"}}, 400, ContextOverflow),
        ({"error": {"message": "x"}}, 400, errors.RequestError),
        ({"error": {"message": "x"}}, 404, errors.ModelNotFound),
        ({"error": {"message": "x"}}, 501, errors.NotSupported),
        ({"error": "just text"}, 500, errors.EngineError),
        ("<html>", 502, Unreachable),
        (None, None, errors.EngineError),
        ({"error": {"message": "x", "nbinfer": {"error": "__doc__"}}}, 500, errors.EngineError),
        ({"error": {"message": "x", "nbinfer": {"error": "annotations"}}}, 500, errors.EngineError),
    ],
)
def test_another_servers_error_is_read_as_well_as_it_can_be(
    body: object, status: int | None, kind: type[NbinferError]
) -> None:
    assert type(error_from_json(body, status)) is kind


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--threads", "4"], {"threads": 4}),
        (["-t=4", "-c", "512"], {"threads": 4, "context_size": 512}),
        (["-ngl", "-1"], {"gpu_layers": -1}),
        (["--no-mmap", "-fa", "off"], {"mmap": False, "flash_attention": False}),
        (["-ts", "0.5,0.5"], {"tensor_split": [0.5, 0.5]}),
        (["--reasoning-budget=-1"], {"reasoning_budget": -1}),
    ],
)
def test_flags_become_options(flags: list[str], options: dict[str, object]) -> None:
    assert flag_options(flags) == options


@pytest.mark.parametrize(
    "flags",
    [
        ["--threads"],
        ["--threads", "x"],
        ["-fa", "maybe"],
        ["--model=x"],
        ["--no-mmap", "x"],
        ["--Threads", "1"],
    ],
)
def test_flags_that_make_no_sense_are_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="runtime-flags"):
        flag_options(flags)


@pytest.mark.parametrize(
    ("text", "number"),
    [("8G", 8 * 2**30), ("512 MiB", 512 * 2**20), ("1.5gb", 3 * 2**29), ("100", 100), ("2k", 2048)],
)
def test_amounts_of_memory_are_read(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "G", "-1G", "8 apples", "1e9", "8GG"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not an amount"):
        parse_bytes(text)


def test_a_runners_size_grows_with_its_files(tmp_path: Path) -> None:
    for i in (1, 2):
        (tmp_path / f"m[1]-0000{i}-of-00002.gguf").write_bytes(b"x" * 4_000_000)
    (tmp_path / "other.gguf").write_bytes(b"x" * 400_000)
    split = bound(tmp_path / "m[1]-00001-of-00002.gguf", {}, gpus=0)
    single = bound(tmp_path / "other.gguf", {}, gpus=0)
    assert split.ram - single.ram == 10_000_000 - 500_000
    on_gpu = bound(tmp_path / "other.gguf", {}, gpus=2)
    assert on_gpu.vram == (500_000, 0)
    assert bound(tmp_path / "other.gguf", {"gpu_layers": 0}, gpus=2) == RequiredMemory(single.ram)


def test_a_runners_size_is_the_models_estimate_and_the_process() -> None:
    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.modes import Mode
    from nbinfer.models.demo import demo_path

    sizes = [
        runner_size(
            demo_path(), Mode.COMPLETION, ModelConfig(context_size=n), {"parallel": 1, "gpu_layers": 0}
        )
        for n in (256, 1024)
    ]
    assert RUNNER_BYTES < sizes[0].ram < sizes[1].ram < RUNNER_BYTES + 2**28


@pytest.mark.parametrize(
    "options", [{"parallel": 4}, {"exact": True}, {"kv_type": "q8_0", "parallel": None}], ids=str
)
def test_the_sidecar_plans_a_model_as_the_kernel_does(options: dict[str, Any]) -> None:
    from nbinfer.backends.estimates import estimate_load
    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.modes import Mode
    from nbinfer.memory import Estimate
    from nbinfer.models import resolve

    demo = resolve("demo")
    planned = runner_size(demo.path, Mode.COMPLETION, ModelConfig(), options)
    made = estimate_load(demo, Mode.COMPLETION, options, exact=False)
    assert isinstance(made, Estimate)
    assert planned.ram == made.required.ram + made.ram.at_hand + RUNNER_BYTES
    assert planned != runner_size(demo.path, Mode.COMPLETION, ModelConfig(), {})


def test_a_runner_that_nobody_started_properly_ends_by_itself() -> None:
    import subprocess

    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "nbinfer.sidecar.runner"], stdin=subprocess.DEVNULL, check=False, timeout=60
    )
    assert done.returncode == 0
    assert time.monotonic() >= began
    with contextlib.suppress(ProcessLookupError):
        assert done.args


def test_the_kernels_side_imports_no_server_and_no_client_package() -> None:
    # A kernel that comes to a loaded model has nothing else to wait for.
    code = (
        "import sys, nbinfer.sidecar.client, nbinfer.engines.remote.engine\n"
        "heavy = {'openai', 'httpx', 'starlette', 'fastapi', 'uvicorn', 'anyio'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
