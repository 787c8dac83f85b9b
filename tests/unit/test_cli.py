"""The command line: tables for people, JSON for programs, errors in a few lines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import nbinfer
from nbinfer import backends, cli, memory, session
from nbinfer.contract.errors import ModelNotFound
from nbinfer.contract.status import BackendStatus

STATUSES = [
    ("llamacpp", BackendStatus.parse("Running: llama.cpp 0.3.36 (CPU)"), ""),
    ("odd", BackendStatus.parse("Error: [bold]x[/] {y}"), "pip install " + "--long-option " * 12 + "'a[b]'"),
    ("vllm", BackendStatus.parse("Not Installed"), "do this"),
]


class Estimate:
    """Says what it was asked."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = asked

    def __str__(self) -> str:
        return f"asked {self._asked}"

    def to_dict(self) -> dict[str, Any]:
        return self._asked


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_status_lists_every_backend_with_its_detail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "statuses", lambda: STATUSES)
    output = run("status")
    for words in ("llama.cpp 0.3.36 (CPU)", "Not Installed", "[bold]x[/] {y}", "vllm: do this"):
        assert words in output
    # A command that was wrapped could not be copied.
    assert STATUSES[1][2] in output


def test_status_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "statuses", lambda: STATUSES)
    rows = json.loads(run("status", "--json"))
    assert [row["backend"] for row in rows] == ["llamacpp", "odd", "vllm"]
    assert rows[0] == {
        "backend": "llamacpp",
        "status": "Running",
        "detail": "llama.cpp 0.3.36 (CPU)",
        "install": "",
    }


def test_models_are_a_table_that_fits_a_screen_and_json_has_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = pd.DataFrame(
        {
            "name": ["demo", "[red]x"],
            "ref": ["demo", "[red]x"],
            "quantisation": ["Q8_0", None],
            "size_bytes": [1 << 20, 5],
            "context": [np.int64(512), None],
            "modes": ["completion", "embedding, x"],
            "problem": ["", "broken header"],
        }
    )
    monkeypatch.setattr(session, "models", lambda: frame)
    output = run("models")
    for words in ("demo", "[red]x", "embedding, x", "512", "1 MiB", "broken"):
        assert words in output
    assert "nan" not in output.lower()
    assert max(map(len, output.splitlines())) <= 80
    rows = json.loads(run("models", "--json"))
    assert (rows[0]["size_bytes"], rows[1]["context"], rows[1]["ref"]) == (1 << 20, None, "[red]x")


def test_no_models_is_said_in_words_and_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "models", lambda: pd.DataFrame(columns=["name"]), raising=False)
    assert "No models" in run("models")
    assert json.loads(run("models", "--json")) == []


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], {}),
        (["--ctx", "4096"], {"context_size": 4096}),
        (["--ctx", "-1"], {"context_size": -1}),
        (
            ["--parallel", "4", "--kv-type", "q8_0", "--gpu-layers", "0"],
            {"parallel": 4, "kv_type": "q8_0", "gpu_layers": 0},
        ),
    ],
)
def test_estimate_passes_on_only_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        memory, "estimate", lambda ref, **given: Estimate({"ref": ref, **given}), raising=False
    )
    assert run("estimate", "demo", *arguments) == f"asked { ({'ref': 'demo'} | asked) }\n"
    assert json.loads(run("estimate", "demo", *arguments, "--json")) == {"ref": "demo"} | asked


def test_the_doctor_prints_what_the_session_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"what": "gpu \x1b[2J", "status": "missing", "detail": "[bold]no[/] driver"}]
    monkeypatch.setattr(session, "doctor", lambda: pd.DataFrame(rows))
    output = run("doctor")
    assert "gpu \u241b[2J" in output
    assert "[bold]no[/] driver" in output
    assert json.loads(run("doctor", "--json")) == rows


def test_an_error_of_ours_is_its_message_and_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(ref: str) -> None:
        raise ModelNotFound(f"no model {ref!r}\x1b[2J.\nDid you mean demo?")

    monkeypatch.setattr(memory, "estimate", fail, raising=False)
    monkeypatch.setattr(sys, "argv", ["nbinfer", "estimate", "dmo"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "nbinfer: no model 'dmo'\u241b[2J.\nDid you mean demo?\n"


def test_the_program_lists_the_real_backends() -> None:
    command = [sys.executable, "-c", "from nbinfer.cli import main; main()", "status", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {row["backend"] for row in json.loads(done.stdout)} >= {"llamacpp", "vllm"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, nbinfer.__version__),
        (["--help"], 0, "estimate"),
        (["nope"], 2, "nope"),
        (["estimate"], 2, "REF"),
        (["estimate", "demo", "--ctx", "many"], 2, "--ctx"),
    ],
)
def test_a_mistake_in_the_command_is_explained(arguments: list[str], code: int, words: str) -> None:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == code
    assert words in done.output
    assert "Traceback" not in done.output
