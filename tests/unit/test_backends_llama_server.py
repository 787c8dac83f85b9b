"""llama-server where it is not: what is said of it, how it would be started, and how its end is told."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from nbinfer import backends
from nbinfer.backends import llama_server
from nbinfer.backends.llama_server import ALLOWED_FLAGS, command_line
from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import BackendUnavailable, ConfigError, ModelLoadError, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.contract.status import StatusWord
from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from pathlib import Path

NEW = frozenset(("--kv-unified", "--offline", "--no-webui", "--cache-ram", "--embd-normalize"))


def program(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program called llama-server on the PATH, and nothing else of that name."""
    path = folder / "bin" / "llama-server"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.delenv(llama_server.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return path


def line(mode: Mode = Mode.COMPLETION, config: ModelConfig | None = None, **options: Any) -> list[str]:
    return command_line(demo_path(), mode, config, options, supported=NEW)


def test_without_the_program_the_status_says_so_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llama_server.VARIABLE, "/no/such/llama-server")
    backend = backends.get("llama-server")
    assert str(backend.status()) == "Not Installed: binary not found"
    assert llama_server.VARIABLE in backend.advice()
    with pytest.raises(BackendUnavailable, match=r"install llama\.cpp"):
        backend.open(demo_path(), mode=Mode.COMPLETION)
    assert backend.disk_usage() == 0


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("echo 'version: 5092 (d3bd7193)' >&2", "Running: llama-server 5092 (d3bd7193)"),
        ("echo hello", "Running: llama-server version unknown"),
        ("echo 'error while loading shared libraries: libllama.so: x' >&2; exit 127", "Error"),
        ("kill -ILL $$", "Error"),
    ],
)
def test_the_program_is_asked_for_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str
) -> None:
    program(tmp_path, script, monkeypatch)
    found = backends.get("llama-server").status()
    assert str(found).startswith(status)
    if found.word is StatusWord.ERROR:
        advice = backends.get("llama-server").advice()
        assert "libllama.so is missing" in advice or "another processor" in advice


def test_its_options_are_flags() -> None:
    found = line(context_size=512, threads=2, gpu_layers=0, kv_type="q8_0", flash_attention=True, mmap=False)
    text = " ".join(found)
    assert f"--model {demo_path()} --ctx-size 512" in text
    for part in ("--threads 2", "--n-gpu-layers 0", "--flash-attn on", "--no-mmap", "--cache-type-v q8_0"):
        assert part in text
    assert "--cpu-moe" in line(experts_on_cpu=True)
    assert "--n-cpu-moe 2" in " ".join(line(experts_on_cpu=2))
    # Nothing is downloaded, and the server keeps no second cache of up to 8 GiB.
    assert "--offline" in text
    assert "--cache-ram 0" in text
    assert set(command_line(demo_path(), Mode.COMPLETION, None, {}, supported=frozenset())).isdisjoint(NEW)


def test_the_context_is_the_trained_one_up_to_the_usual_unless_asked_for() -> None:
    def context(**options: Any) -> str:
        found = line(**options)
        return found[found.index("--ctx-size") + 1]

    assert context() == "1024"
    assert context(context_size=-1) == "1024"
    assert context(config=ModelConfig(context_size=300)) == "300"


@pytest.mark.parametrize(("mode", "flag"), [("embedding", "--embeddings"), ("reranking", "--reranking")])
def test_texts_of_an_encoder_go_in_one_piece(mode: str, flag: str) -> None:
    found = line(Mode(mode), context_size=700)
    assert flag in found
    assert found[found.index("--ubatch-size") + 1] == "700"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"nonsense": 1}, ConfigError, "no option 'nonsense'"),
        ({"threads": "4"}, ConfigError, "whole number"),
        ({"context_size": 0}, ConfigError, "context_size=0"),
        ({"kv_type": "q9"}, ConfigError, "kv_type"),
        ({"mode": Mode.IMAGE_GENERATION}, NotSupported, "images"),
        ({"config": ModelConfig(speculative={"num_tokens": 3})}, NotSupported, "llamacpp"),
        ({"config": ModelConfig(runtime_flags=["--temp", "1"])}, ConfigError, "--temp"),
    ],
)
def test_what_it_cannot_take_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        line(**options)


@pytest.mark.parametrize(
    "flags",
    [
        ["--host", "0.0.0.0"],  # noqa: S104 - what must be refused
        ["--port", "80"],
        ["--model", "x"],
        ["--tools", "all"],
        ["--agent"],
        ["--hf-repo", "a"],
        ["--rpc", "a"],
        ["--log-file", "x"],
        ["--slot-save-path", "x"],
        ["--api-key", "x"],
        ["--mcp-servers-json", "{}"],
        ["--lora", "x"],
    ],
    ids=" ".join,
)
def test_flags_that_name_places_or_open_doors_are_not_allowed(flags: list[str]) -> None:
    assert flags[0] not in ALLOWED_FLAGS
    with pytest.raises(ConfigError):
        line(config=ModelConfig(runtime_flags=flags))


def test_allowed_flags_come_last_so_that_they_hold() -> None:
    assert line(config=ModelConfig(runtime_flags=["--threads", "3"]), threads=1)[-2:] == ["--threads", "3"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'cudaMalloc failed: out of memory' >&2; exit 1", r"GPU ran out of memory.*exit code 1"),
        ("echo \"unknown model architecture: 'nope'\" >&2; exit 1", "architecture nope is not known"),
        ("kill -SEGV $$", "SIGSEGV"),
    ],
)
def test_a_server_that_dies_while_it_loads_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    program(
        tmp_path,
        f'case "$1" in --version) echo "version: 1 (a)";; --help) ;; *) {script};; esac',
        monkeypatch,
    )
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(llama_server, "_short_folder", lambda: str(tmp_path))
    with pytest.raises(ModelLoadError, match=said):
        backends.get("llama-server").open(demo_path(), mode=Mode.COMPLETION, name="demo")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_what_the_environment_says_to_the_program_does_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A forgotten LLAMA_ARG_PORT or LLAMA_ARG_TOOLS would open what was never asked for.
    script = 'case "$1" in --version) echo "version: 1 (a)";; --help) ;; *) env >&2; exit 9;; esac'
    program(tmp_path, script, monkeypatch)
    for name in ("LLAMA_ARG_TOOLS", "LLAMA_ARG_PORT", "LLAMA_API_KEY"):
        monkeypatch.setenv(name, "smuggled")
    server = llama_server._Server(llama_server.find() or "", [], what="x")
    with pytest.raises(ModelLoadError):
        server.wait_ready()
    assert "PATH=" in server._control.log.text()
    assert "smuggled" not in server._control.log.text()
