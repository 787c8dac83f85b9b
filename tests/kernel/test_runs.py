"""Whole runs: a notebook by papermill and nbclient, IPython in a terminal, the demo model in a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import nbformat.v4
import pytest
from nbclient import NotebookClient
from support.kernel import WITH_FAKE, kernel

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kernel


v4: Any = nbformat.v4  # not typed
read: Any = nbformat.read
write: Any = nbformat.write


def write_notebook(path: Path, *cells: str) -> Path:
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(
        cells=[v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": spec}
    )
    write(notebook, path)
    return path


MISTAKES = {
    "option": "%infer --temprature 1 x",
    "variable": "%%infer\n{{ nope }}",
    "file": "%nbinfer load missing.gguf",
    "gguf": "%nbinfer load corrupt.gguf",
}
FAILING = f"""{WITH_FAKE}
from nbinfer.contract.errors import EngineError
engine.script = lambda request: ["so far", EngineError("the GPU is gone.")]
"""


def run_all(commands: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str]]:
    """Run modules of Python side by side; return exit status and output of each."""
    runs = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    ended = {}
    for name, run in runs.items():
        with run:
            said, _ = run.communicate(timeout=120)
        ended[name] = run.returncode, said
    return ended


def test_papermill_fails_on_every_mistake_and_passes_without(tmp_path: Path) -> None:
    (tmp_path / "corrupt.gguf").write_bytes(b"GGUF" + b"x" * 100)
    commands = {}
    for name, cell in {**MISTAKES, "right": "%infer hello"}.items():
        path = write_notebook(tmp_path / f"{name}.ipynb", WITH_FAKE, cell)
        commands[name] = ["papermill", "--no-progress-bar", str(path), str(tmp_path / f"{name}-out.ipynb")]
    codes = {name: code for name, (code, _) in run_all(commands, tmp_path).items()}
    assert codes.pop("right") == 0
    assert all(code != 0 for code in codes.values()), codes


def test_a_failing_engine_fails_the_run_whatever_runs_the_notebook(tmp_path: Path) -> None:
    for name, setup in {"right": WITH_FAKE, "fails": FAILING}.items():
        write_notebook(tmp_path / f"{name}.ipynb", setup, "%infer hello")
    ended = run_all(
        {
            "papermill": ["papermill", "--no-progress-bar", "fails.ipynb", "out.ipynb"],
            "jupyter execute": ["jupyter", "execute", "fails.ipynb"],
            "jupyter execute, right": ["jupyter", "execute", "right.ipynb"],
            "nbmake": ["pytest", "--nbmake", "-p", "no:cacheprovider", "fails.ipynb", "right.ipynb"],
        },
        tmp_path,
    )
    assert ended.pop("jupyter execute, right")[0] == 0
    for name, (code, said) in ended.items():
        assert code != 0, name
        assert "EngineError: the GPU is gone." in said, name
    assert "1 failed, 1 passed" in ended["nbmake"][1]


def test_a_saved_notebook_keeps_the_final_state_and_what_was_asked(tmp_path: Path) -> None:
    path = write_notebook(
        tmp_path / "run.ipynb",
        WITH_FAKE,
        "engine.script = lambda request: ['one ', 0.2, '**two**']",
        "%infer --seed 7 go",
    )
    notebook = read(path, as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.validate(notebook)
    (output,) = notebook.cells[-1].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"] == "one **two**"
    assert "one <strong>two</strong>" in output.data["text/html"]
    assert output.metadata["nbinfer"]["seed"] == 7
    assert output.metadata["nbinfer"]["model"] == "fake"


def test_a_terminal_streams_plain_text(tmp_path: Path) -> None:
    cells = [
        *WITH_FAKE.strip().splitlines(),
        "from nbinfer.contract.results import Delta",
        "engine.script = lambda r: [Delta('hm', reasoning=True), 'one ', 'two']",
        "%infer Where is Paris?",
        "x = %infer again",
        "print('x is', x)",
        "%infer --temprature 1 x",
        "print('still', 'here')",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=nocolor"],
        input="\n".join(cells) + "\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "IPYTHONDIR": str(tmp_path)},
        timeout=120,
        check=True,
    )
    assert "one two\n" in run.stdout
    assert "fake · 3 tokens" in run.stdout
    assert run.stdout.count("one two") == 3  # two answers, and x
    assert "x is one two" in run.stdout
    assert "hm" in run.stderr
    assert "hm" not in run.stdout
    assert "Did you mean --temperature" in run.stderr
    assert "still here" in run.stdout


def test_a_console_on_a_kernel_shows_whole_answers(tmp_path: Path) -> None:
    # It shows an output when it comes and never replaces it: what is updated in place would stay a beginning.
    pexpect = pytest.importorskip("pexpect")  # a terminal, as there is none on Windows
    command = ["-m", "jupyter_console", "--simple-prompt", "--ZMQTerminalInteractiveShell.kernel_timeout=60"]
    environment = {**os.environ, "TERM": "dumb", "IPYTHONDIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    console = pexpect.spawn(
        sys.executable, command, env=environment, encoding="utf8", timeout=60, cwd=str(tmp_path)
    )
    try:
        seen = []
        for line in [
            *WITH_FAKE.strip().splitlines(),
            "engine.script = lambda request: ['one ', 0.3, 'two ', 0.3, 'three']",
            "%infer hello",
            "x = %infer again",
            "print('x is', x)",
        ]:
            console.expect(r"In \[\d+\]: ")
            seen.append(console.before)
            console.sendline(line)
        console.expect(r"In \[\d+\]: ")
        shown = "".join([*seen, console.before])
        assert shown.count("one two three") == 3, shown  # two answers, and x
        assert "x is one two three" in shown
        assert "fake · 3 tokens" in shown
    finally:
        console.close(force=True)


_NO_IPYTHON = """
import sys

for name in ("IPython", "ipykernel", "ipywidgets", "anywidget", "matplotlib", "traitlets"):
    sys.modules[name] = None  # importing it says that there is no such module
import nbinfer as nb

nb.load("demo", threads=1)
for piece in nb.stream("What is the capital of France?"):
    print(piece, end="|", flush=True)
print()
result = nb.infer("What is the capital of Peru?", logprobs=2)
print(result, result.show_logprobs(), sep="\\n")
print(nb.complete(["What is the capital of Cuba?"], cache=False)["completion"][0])
print(nb.models()["name"].tolist(), nb.estimate("demo").verdict)
print(nb.plot_sweep(nb.estimate("demo", exact=False), context_size=[256]))
nb.unload()
"""


@pytest.mark.engine
def test_plain_python_needs_no_ipython(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _NO_IPYTHON],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].replace("|", "") == "The capital of France is Paris."
    assert lines[0].count("|") > 3  # in pieces, not at once
    assert lines[1] == "The capital of Peru is Lima."
    assert any(line.startswith("' L'") for line in lines)
    assert "The capital of Cuba is Havana." in lines
    assert any("demo-embed" in line for line in lines)
    assert any("Memory of demo by context_size" in line for line in lines)


@pytest.mark.engine
def test_the_demo_model_answers_in_a_kernel(tmp_path: Path) -> None:
    with kernel(tmp_path) as nb:
        loaded = nb.run("%load_ext nbinfer\n%nbinfer load demo -p threads=1")
        assert loaded.reply["status"] == "ok", loaded.error_text
        assert loaded.printed == ""  # llama.cpp's log is not for people
        ran = nb.run("%infer -o r What is the capital of France?")
        assert ran.shown[-1] == "The capital of France is Paris."
        assert nb.value("r.finish_reason") == "'stop'"
        rows = nb.run("%nbinfer ps").of("execute_result")[0]["data"]
        assert "demo" in rows["text/html"]
        nb.run("%nbinfer unload")
        assert nb.run("%infer x").reply["ename"] == "ModelNotFound"


@pytest.mark.engine
def test_restart_and_run_all_gives_the_same_text(tmp_path: Path) -> None:
    cells = (
        "%load_ext nbinfer\n%nbinfer load demo -p threads=1",
        "%infer -o r --seed 7 --temperature 1.5 --max-tokens 40 Tell me a story.",
        "%infer -o plain What is the capital of Peru?",
    )
    with kernel(tmp_path) as nb:
        texts = []
        for _ in range(2):
            for cell in cells:
                ran = nb.run(cell)
                assert ran.reply["status"] == "ok", ran.error_text
            texts.append(nb.value("(r.text, plain.text)"))
            nb.manager.restart_kernel(now=True)
            nb.client.wait_for_ready(timeout=60)
    assert texts[0] == texts[1]
    assert "Lima" in texts[0]
