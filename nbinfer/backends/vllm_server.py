"""vLLM's own server as a child of this process: started, followed until it answers, and ended whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.backends import guard
from nbinfer.backends.crash import explain
from nbinfer.backends.process import LogTail
from nbinfer.contract.errors import EngineClosed, ModelLoadError
from nbinfer.contract.modes import Mode
from nbinfer.engines.remote.unix import BrokenConnectionError, UnixClient
from nbinfer.engines.remote.wire import RunnerLost
from nbinfer.engines.vllm import launch
from nbinfer.engines.vllm.arguments import environment
from nbinfer.engines.vllm.failures import errors_of, failure

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Mapping, Sequence

    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.errors import NbinferError
    from nbinfer.engines.protocol import Engine
    from nbinfer.engines.vllm.arguments import VllmArguments
    from nbinfer.engines.vllm.build import Device, VllmBuild

POLL_SECONDS = 0.1
END_SECONDS = 10.0
# vLLM makes sockets in its folder whose names have 37 characters; a socket's path has 103 in all.
_LONGEST_FOLDER = 60

# What the log says when a stage begins, the stage, and how much of a start is behind it then: shares of the
# time that a start takes where nothing is compiled.
_STAGES = tuple(
    (re.compile(pattern), stage, fraction)
    for pattern, stage, fraction in (
        (r"Resolved architecture", "reading the configuration", 0.4),
        (r"Initializing a V1 LLM engine|Waiting for .* engine core", "starting the engine", 0.65),
        (r"Starting to load model", "reading weights", 0.7),
        (r"Loading weights took|Model loading took", "preparing the KV cache", 0.9),
        (r"Dynamo bytecode transform|Compiling a graph|torch\.compile takes", "compiling", 0.92),
        (r"Captur\w+ CUDA graphs?", "capturing CUDA graphs", 0.94),
        (r"init engine \(profile|Starting vLLM server", "warming up", 0.96),
    )
)
_DEAD = "EngineDeadError"
_SHARDS = re.compile(r"checkpoint shards:\s+(\d+)% Completed")
_REPORTS = {
    "kv_cache_tokens": re.compile(r"KV cache size: ([\d,]+) tokens"),
    "weights_gib": re.compile(r"Model loading took ([\d.]+) GiB"),
    "architecture": re.compile(r"Resolved architecture: (\w+)"),
    "dtype": re.compile(r"Initializing a V1 LLM engine .*?\bdtype=(?:torch\.)?(\w+)"),
}


class VllmServer:
    """``vllm serve`` for one model, on a Unix socket that only this user can open.

    Parameters
    ----------
    arguments
        What to load.
    build
        The vLLM that is installed.
    name
        What the model is called there, and in messages.
    flags
        Flags of vLLM's command line, checked against the allowlist.
    on_stage
        Called with the stage of the start, in words, and how much of it is done, 0 to 1.
    on_lost
        Called once with the crash report when the server ends by itself after it was ready.

    Attributes
    ----------
    socket
        Where it answers.
    pid
        The guard's process, and the number of the server's session.
    reports
        What vLLM said about itself: ``kv_cache_tokens``, ``weights_gib`` (on GPUs), ``architecture``,
        ``dtype``.
    """

    def __init__(
        self,
        arguments: VllmArguments,
        build: VllmBuild,
        *,
        name: str,
        flags: Sequence[str] = (),
        on_stage: Callable[[str, float], None] = lambda _stage, _fraction: None,
        on_lost: Callable[[NbinferError], None] = lambda _error: None,
    ) -> None:
        self.name = name
        self.log = LogTail()
        self.reports: dict[str, str] = {}
        self._on_stage, self._on_lost = on_stage, on_lost
        self._stage = -1
        self._ended = threading.Event()
        self._ready = self._stopped = False
        self._code: str | None = None
        self._folder = folder = _private_folder()
        self.socket = str(folder / "v.sock")
        command = [
            *(sys.executable, "-I", "-S", guard.__file__, str(folder)),
            *(sys.executable, "-P", "-W", "ignore", launch.__file__, "serve"),
            *command_line(arguments, name=name, socket=self.socket, folder=folder),
            *flags,
        ]
        # The user's key for another server: this one would ask it of us.
        inherited = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
        try:
            # A session of its own: the guard ends all of it, and an interrupt of a cell does not reach it.
            self._guard = subprocess.Popen(  # noqa: S603 - our own programs
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**inherited, **environment(build.device, arguments), **_places(folder)},
            )
        except BaseException:
            folder.rmdir()
            raise
        self.pid = self._guard.pid
        self._reader = threading.Thread(target=self._read, name="nbinfer-vllm-log", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, name="nbinfer-vllm-watch", daemon=True).start()
        on_stage("importing vllm", 0.0)

    # -- the log ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Keep the log, pass it on to this process' own output, and learn from it."""
        output: io.BufferedReader = self._guard.stdout  # type: ignore[assignment]
        rest = b""
        with contextlib.suppress(OSError, ValueError):
            while data := output.read1(65_536):
                self.log.write(data)
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
                *lines, rest = re.split(rb"[\r\n]", rest + data)
                for line in lines:
                    self._learn(line.decode("utf-8", "replace"))

    def _learn(self, line: str) -> None:
        if line.startswith(guard.MARK):
            self._code = line.removeprefix(guard.MARK)
            return
        if self._ready:
            if _DEAD in line:
                # vLLM takes seconds to end after this; whoever waits for an answer need not.
                self._close_pipe()
            return
        for name, pattern in _REPORTS.items():
            if found := pattern.search(line):
                self.reports.setdefault(name, found[1].replace(",", ""))
        for i, (pattern, stage, fraction) in enumerate(_STAGES):
            # Only forwards: messages of several processes are mixed.
            if i > self._stage and pattern.search(line):
                self._stage = i
                self._on_stage(stage, fraction)
        if found := _SHARDS.search(line):
            self._on_stage("reading weights", 0.7 + 0.2 * int(found[1]) / 100)

    # -- life -------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Wait for the end, however it comes."""
        if hasattr(os, "waitid"):
            # Not reaped yet: its number is its session's, and cannot be given to another process.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self._guard.pid, os.WEXITED | os.WNOWAIT)
        # Nothing is left to do, unless it was the guard that was killed.
        guard.end_session(self._guard.pid)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._guard.wait()
        self._reader.join(2)
        self._ended.set()
        if self._ready and not self._stopped:
            self._on_lost(RunnerLost(str(self._report())))

    def _report(self) -> Any:
        # vLLM's exit code is 0 after a crash too: that it ended at all is what counts.
        code = int(self._code) if self._code is not None and self._code != "none" else -9
        log = self.log.text().partition(f"\n{guard.MARK}")[0]
        return explain(code, log, what=self.name, evidence=errors_of(log), known=failure)

    def wait_ready(self) -> None:
        """Wait until it listens and says that it is healthy, for as long as that takes.

        It may still be unable to answer: ask it for a token before you believe it, then call
        :meth:`note_ready`.

        Raises
        ------
        ModelLoadError
            It ended instead; the message says why.
        EngineClosed
            :meth:`stop` was called.
        """
        while not self._healthy():
            if self._ended.wait(POLL_SECONDS):
                self.check_alive()

    def check_alive(self) -> None:
        """Raise what ended it, when it has ended.

        Raises
        ------
        ModelLoadError, EngineClosed
            As :meth:`wait_ready` does.
        """
        if self._ended.is_set():
            if self._stopped:
                raise EngineClosed(f"{self.name}: the load was cancelled.")
            raise ModelLoadError(str(self._report()))

    def problem(self, seconds: float) -> NbinferError | None:
        """Return what ended it by itself within ``seconds``; None: it runs, or was stopped."""
        ended = self._ended.wait(seconds) and not self._stopped
        return RunnerLost(str(self._report())) if ended else None

    def note_ready(self) -> None:
        """From now on its end is a loss, and no failed load."""
        self._ready = True
        self.check_alive()
        self._on_stage("ready", 1.0)

    def _healthy(self) -> bool:
        async def ask() -> bool:
            client = UnixClient(self.socket)
            try:
                async with asyncio.timeout(5):
                    answer = await client.request("GET", "/health", b"")
                    await answer.read()
                    return answer.status == 200  # noqa: PLR2004 - OK
            except (BrokenConnectionError, OSError, TimeoutError):
                return False
            finally:
                client.close()

        return Path(self.socket).exists() and asyncio.run(ask())

    def stop(self) -> None:
        """End it and all that it started; returns when that is gone. Idempotent.

        Not by asking: while it starts, vLLM swallows every request to end. It keeps nothing that is worth
        saving, and the guard cleans up.
        """
        self._stopped = True
        self._close_pipe()
        if not self._ended.wait(END_SECONDS):
            with contextlib.suppress(OSError):
                os.killpg(self._guard.pid, 9)
            self._ended.wait(END_SECONDS)

    def _close_pipe(self) -> None:
        """Have the guard end everything."""
        with contextlib.suppress(OSError):
            self._guard.stdin.close()  # type: ignore[union-attr]


def command_line(arguments: VllmArguments, *, name: str, socket: str, folder: Path) -> list[str]:
    """Return the arguments of ``vllm serve``; a chat template is written into ``folder``."""
    engine = dict(arguments.engine)
    line = [engine.pop("model"), "--served-model-name", name, "--uds", socket]
    # Its metrics are ours to publish, its requests ours to log; what was read from a cache is in our results.
    line += [
        "--uvicorn-log-level",
        "warning",
        "--disable-uvicorn-access-log",
        "--enable-prompt-tokens-details",
    ]
    for field, value in engine.items():
        flag = f"--{field.replace('_', '-')}"
        if isinstance(value, bool):
            if field != "trust_remote_code":
                line.append(flag if value else f"--no-{flag[2:]}")
        else:
            line += [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
    if arguments.adapters:
        line += ["--lora-modules", *(f"{key}={path}" for key, path in arguments.adapters.items())]
    if arguments.tool_call_parser:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", arguments.tool_call_parser]
    if arguments.reasoning_parser:
        line += ["--reasoning-parser", arguments.reasoning_parser]
    if arguments.chat_template:
        path = folder / "template.jinja"
        path.write_text(arguments.chat_template, encoding="utf-8")
        line += ["--chat-template", str(path)]
    return line


def open_served(
    path: Path,
    *,
    mode: Mode,
    name: str,
    config: ModelConfig,
    flags: Sequence[str],
    on_stage: Callable[[str, float], None],
    on_lost: Callable[[NbinferError], None],
    options: dict[str, Any],
) -> Engine:
    """Start vLLM's server for a model, and return the engine in front of it.

    For parameters and errors see ``VllmBackend.open_server``.
    """
    from nbinfer.engines.vllm.arguments import arguments
    from nbinfer.engines.vllm.build import installed
    from nbinfer.engines.vllm.served import ServedCompletions, ServedPooling
    from nbinfer.gguf.safetensors import read_safetensors

    build = installed()
    assert build is not None  # noqa: S101 - its backend has looked
    options = {key: value for key, value in options.items() if key != "on_progress"}
    described = {"digest": options.pop("digest", ""), "version": build.version}
    exact = bool(options.pop("exact", False))
    given = arguments(path, mode=mode, device=build.device, config=config, options=options)
    header = read_safetensors(path)
    started = replace(given, engine=_for_server(given.engine, mode, build.device, exact=exact))
    server = VllmServer(started, build, name=name, flags=flags, on_stage=on_stage, on_lost=on_lost)
    try:
        if mode is Mode.COMPLETION:
            return ServedCompletions(
                given, server, path=path, header=header, device=build.device, exact=exact, **described
            )
        return ServedPooling(given, server, mode=mode, path=path, header=header, **described)
    except BaseException:
        server.stop()
        raise


def _for_server(engine: Mapping[str, Any], mode: Mode, device: Device, *, exact: bool) -> dict[str, Any]:
    """Return the settings of an engine that a server runs; as in the kernel where that chooses, too."""
    from nbinfer.engines.vllm.generate import CPU_BLOCK

    out = dict(engine)
    if mode is Mode.COMPLETION:
        # Else a server that can tell thoughts apart leaves everything before their end free.
        out["structured_outputs_config"] = {**out["structured_outputs_config"], "enable_in_reasoning": True}
        if device == "cpu":
            out.setdefault("block_size", CPU_BLOCK)
        # A cell's request goes before batch rows, and has a seat of its own.
        out |= {"scheduling_policy": "priority", "max_logprobs": -1}
        if exact:
            out |= {"max_num_seqs": 1, "enable_prefix_caching": False}
        elif "max_num_seqs" in out:
            out["max_num_seqs"] += 1
    return out


def _private_folder() -> Path:
    """Make a folder for one server: vLLM leaves sockets and files wherever it runs."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) + len("/nbv-12345678") > _LONGEST_FOLDER:
        base = "/tmp"  # noqa: S108 - mkdtemp makes it this user's alone
    return Path(tempfile.mkdtemp(prefix="nbv-", dir=base))


def _places(folder: Path) -> dict[str, str]:
    return {
        "VLLM_RPC_BASE_PATH": str(folder),
        "TMPDIR": str(folder),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }
