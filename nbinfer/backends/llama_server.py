"""The llama-server backend: llama.cpp's own server, where somebody has installed it.

For GPUs and processors that its packagers build it for. A model runs in a process of its own, also where it
is loaded in the kernel; in the sidecar, behind a runner of ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract import status as words
from nbinfer.contract.errors import BackendUnavailable, ConfigError, EngineClosed, NbinferError, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.contract.status import BackendStatus, StatusWord

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbinfer.backends.process import RunControl
    from nbinfer.contract.config import ModelConfig
    from nbinfer.engines.llamaserver import LlamaServerEngine
    from nbinfer.engines.protocol import Engine, EngineInfo

VARIABLE = "NBINFER_LLAMA_SERVER"
_PROGRAM = "llama-server"
_INSTALL = (
    "install llama.cpp (brew install llama.cpp, or a release of ggml-org/llama.cpp) so that "
    f"{_PROGRAM} is on the PATH, or name the program in {VARIABLE}"
)
_ASK_SECONDS = 30
_POLL_SECONDS = 0.05
_WHY_SECONDS = 2.0
_PARALLEL = 4

# The engine's options by name, and the flag of each; the values of these are numbers or words.
_OPTIONS = {
    "parallel": "--parallel",
    "gpu_layers": "--n-gpu-layers",
    "threads": "--threads",
    "batch_size": "--batch-size",
    "micro_batch": "--ubatch-size",
    "main_gpu": "--main-gpu",
    "reasoning_budget": "--reasoning-budget",
}
_OTHER_OPTIONS = (
    "context_size",
    "kv_type",
    "flash_attention",
    "mmap",
    "tensor_split",
    "experts_on_cpu",
    "projector",
)
# Of speed and memory: nothing that names a file, an address or a tool, or that fetches anything.
ALLOWED_FLAGS = frozenset(
    """
    --threads -t --threads-batch -tb --prio --poll --numa --ctx-size -c --parallel -np --batch-size -b
    --ubatch-size -ub --flash-attn -fa --cache-type-k -ctk --cache-type-v -ctv --gpu-layers
    --n-gpu-layers -ngl --split-mode -sm --tensor-split -ts --main-gpu -mg --cpu-moe -cmoe --n-cpu-moe
    -ncmoe --no-kv-offload -nkvo --no-op-offload --no-repack --no-mmap --mlock --swa-full --cache-reuse
    --cache-ram --kv-unified --no-kv-unified --no-warmup --no-cont-batching --context-shift --pooling
    --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor
    --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast --reasoning-format --reasoning-budget
    --check-tensors
    """.split()  # noqa: SIM905 - a list of words reads best as one
)


class LlamaServerBackend:
    """llama.cpp's own server."""

    name = "llama-server"
    formats = ("gguf",)
    allowed_flags = ALLOWED_FLAGS
    uses_external_model_management = False
    uses_tcp = False

    def status(self) -> BackendStatus:
        """Look for the program, and ask it for its version, once."""
        return self._look()[0]

    def advice(self) -> str:
        """Return how to install it, or why it does not start."""
        return self._look()[1]

    def _look(self) -> tuple[BackendStatus, str]:
        if sys.platform == "win32":
            return BackendStatus(StatusWord.NOT_INSTALLED, "needs Unix sockets"), "use the llamacpp backend"
        binary = find()
        if binary is None:
            return BackendStatus(StatusWord.NOT_INSTALLED, words.BINARY_NOT_FOUND), _INSTALL
        found, problem = _version(*_identity(binary))
        if problem:
            return BackendStatus(StatusWord.ERROR, f"{_PROGRAM} does not start"), f"{binary}: {problem}"
        return BackendStatus(StatusWord.RUNNING, f"{_PROGRAM} {found or words.VERSION_UNKNOWN}"), ""

    def install(self) -> None:
        """Do nothing when it is usable; else say what to do.

        Raises
        ------
        BackendUnavailable
            With how to install it, or why it does not start.
        """
        found, advice = self._look()
        if not found.usable:
            raise BackendUnavailable(f"{self.name}: {found}\n{advice}")

    def open(
        self,
        path: Path,
        *,
        mode: Mode,
        name: str = "",
        config: ModelConfig | None = None,
        digest: str = "",
        on_progress: Any = None,
        **options: Any,
    ) -> Engine:
        """Start a server for a model, and return its engine once it answers.

        Raises
        ------
        BackendUnavailable
            The program is not here, or does not start.
        ConfigError, NotSupported
            There is no such option, or flag; or the server is not asked for this here.
        ModelLoadError
            The server ended; the message says why.
        """
        self.install()
        binary = find()
        assert binary is not None  # noqa: S101 - checked by install
        flags = command_line(path, mode, config, options, supported=_flags(*_identity(binary)))
        server = _Server(binary, flags, what=name or path.name)
        try:
            server.wait_ready()
            info = server.describe(name=name or path.name, mode=mode, digest=digest, version=self._version())
        except BaseException:
            server.stop()
            raise
        if on_progress is not None:
            on_progress(1.0)
        return server.engine(info)

    def _version(self) -> str:
        return (self.status().detail or "").removeprefix(f"{_PROGRAM} ")

    def run(
        self,
        socket: str,
        model: Path,
        model_ref: str,
        mode: Mode,
        config: ModelConfig,
        *,
        control: RunControl | None = None,
    ) -> None:
        """Serve one model at a Unix socket, behind a runner of ours; return when both have ended.

        Raises
        ------
        BackendUnavailable, ConfigError, NotSupported, ModelLoadError
            As :meth:`open`.
        RunnerLost
            A process crashed; the message is the crash report.
        """
        from nbinfer.backends.process import serve_engine

        self.install()
        serve_engine(self.name, socket, model, model_ref, mode, config, control)

    def disk_usage(self) -> int:
        """Bytes of the program; its libraries belong to whoever installed it."""
        binary = find()
        return 0 if binary is None else Path(binary).stat().st_size


# -- the program ----------------------------------------------------------------------------------------


def find() -> str | None:
    """Return the path of the program: what the environment names, else what is on the PATH."""
    return shutil.which(os.environ.get(VARIABLE) or _PROGRAM)


def _identity(binary: str) -> tuple[str, int]:
    """Return what an answer of the program is remembered by: another file is asked again."""
    return binary, Path(binary).stat().st_mtime_ns


@cache
def _version(binary: str, mtime: int) -> tuple[str, str]:
    """Return the version, and why the program does not start."""
    del mtime
    from nbinfer.backends.crash import explain

    try:
        done = _ask(binary, "--version")
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)[:300]
    text = done.stdout + done.stderr
    if done.returncode:
        return "", str(explain(done.returncode, text, what=_PROGRAM))
    found = re.search(r"^version: (.+)$", text, re.MULTILINE)
    return (found[1].strip() if found else ""), ""


@cache
def _flags(binary: str, mtime: int) -> frozenset[str]:
    """Return the flags that this version of the program knows."""
    del mtime
    try:
        done = _ask(binary, "--help")
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout + done.stderr))


def _ask(binary: str, flag: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the program that the user installed
        [binary, flag],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_ASK_SECONDS,
        check=False,
    )


def command_line(
    path: Path,
    mode: Mode,
    config: ModelConfig | None,
    options: Mapping[str, Any],
    *,
    supported: frozenset[str],
) -> list[str]:
    """Return the server's arguments for a model, without where it listens.

    Parameters
    ----------
    supported
        What this version of the program knows.

    Raises
    ------
    ConfigError
        There is no such option, a value is refused, or a runtime flag is not allowed.
    NotSupported
        The server is not asked for this here.
    """
    if mode is Mode.IMAGE_GENERATION:
        raise NotSupported(
            "llama-server does not generate images; it serves completion, embedding, reranking."
        )
    asked = {**_configured(config), **{key: value for key, value in options.items() if value is not None}}
    known = (*_OPTIONS, *_OTHER_OPTIONS)
    for option in asked:
        if option not in known:
            raise ConfigError(f"llama-server has no option {option!r}.\nOptions: {', '.join(sorted(known))}.")
    context = _context(path, asked.get("context_size"))
    line = ["--model", str(path), "--ctx-size", str(context)]
    pooled = mode is not Mode.COMPLETION
    if pooled:
        line += ["--embeddings" if mode is Mode.EMBEDDING else "--reranking"]
        # An encoder takes a text in one piece.
        asked = {"batch_size": context, "micro_batch": context, **asked}
    asked = {"parallel": _PARALLEL, **asked}
    for option, flag in _OPTIONS.items():
        if option in asked:
            line += [flag, str(_whole(option, asked[option]))]
    line += _words(asked)
    # Sequences share one cache of the asked size, as in our own engine. Nothing is fetched, and no second
    # cache grows beyond what was planned for.
    for flag, *value in (("--kv-unified",), ("--offline",), ("--no-webui",), ("--cache-ram", "0")):
        if flag in supported:
            line += [flag, *value]
    if pooled and "--embd-normalize" in supported:
        line += ["--embd-normalize", "-1"]
    return [*line, *_runtime_flags(config)]


def _configured(config: ModelConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    if config.speculative is not None:
        raise NotSupported("llama-server: speculative is not offered here; use the llamacpp backend.")
    budget = None if config.llamacpp is None else config.llamacpp.reasoning_budget
    given = {"context_size": config.context_size, "reasoning_budget": budget}
    return {key: value for key, value in given.items() if value is not None}


def _runtime_flags(config: ModelConfig | None) -> list[str]:
    from nbinfer.contract.flags import check_flags

    flags = [] if config is None else list(config.runtime_flags or ())
    return list(check_flags(flags, ALLOWED_FLAGS, backend="llama-server"))


def _context(path: Path, asked: Any) -> int:
    from nbinfer.gguf import read_header
    from nbinfer.memory.defaults import CONTEXT

    trained: int | None = read_header(path).context_length
    if asked is None:
        return int(min(trained or CONTEXT, CONTEXT))
    size = _whole("context_size", asked)
    if size == -1:
        return int(trained or 0)  # 0 is the server's word for it
    if size < 1:
        raise ConfigError(f"context_size={size} is refused: it is a number of tokens, or -1.")
    return size


def _words(asked: Mapping[str, Any]) -> list[str]:
    line = []
    if "kv_type" in asked:
        from nbinfer.memory.settings import KV_TYPES

        if asked["kv_type"] not in KV_TYPES:
            raise ConfigError(f"kv_type={asked['kv_type']!r:.40} is unknown: use {', '.join(KV_TYPES)}.")
        line += ["--cache-type-k", asked["kv_type"], "--cache-type-v", asked["kv_type"]]
    if "flash_attention" in asked:
        line += ["--flash-attn", "on" if asked["flash_attention"] else "off"]
    if asked.get("mmap") is False:
        line.append("--no-mmap")
    if "tensor_split" in asked:
        line += ["--tensor-split", ",".join(f"{float(share):g}" for share in asked["tensor_split"])]
    if asked.get("experts_on_cpu") is True:
        line.append("--cpu-moe")
    elif asked.get("experts_on_cpu"):
        line += ["--n-cpu-moe", str(_whole("experts_on_cpu", asked["experts_on_cpu"]))]
    if "projector" in asked:
        line += ["--mmproj", str(asked["projector"])]
    return line


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r:.40} is refused: it is a whole number.")
    return int(value)


# -- the process ----------------------------------------------------------------------------------------


class _Server:
    """One llama-server, on a Unix socket in a folder that only this user can enter."""

    def __init__(self, binary: str, flags: Sequence[str], *, what: str) -> None:
        from nbinfer.backends import guard
        from nbinfer.backends.process import RunControl

        self._what = what
        self._control = RunControl()
        self._ended = threading.Event()
        self._error: NbinferError | None = None
        self._engine: LlamaServerEngine | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="nbl-", dir=_short_folder()))
        self.socket = str(self._folder / "l.sock")
        # The guard ends the server when this process is gone, however that went.
        command = [sys.executable, "-I", "-S", guard.__file__, str(self._folder), binary, *flags]
        command += ["--host", self.socket, "--alias", what]
        self._thread = threading.Thread(
            target=self._run, args=(command,), name="nbinfer-llama-server", daemon=True
        )
        self._thread.start()

    def _run(self, command: Sequence[str]) -> None:
        from nbinfer.backends.process import supervise

        try:
            supervise(command, self._control, what=self._what)
        except NbinferError as error:
            self._error = self._explained(error)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._ended.set()
        if self._error is not None and self._engine is not None:
            self._engine.lose(self._error)

    def _explained(self, error: NbinferError) -> NbinferError:
        """Return the report of the server's end: what ``supervise`` saw end is its guard."""
        from nbinfer.backends.crash import explain
        from nbinfer.backends.guard import MARK
        from nbinfer.engines.remote.wire import RunnerLost

        log, _, code = self._control.log.text().rpartition(MARK)
        if not code.strip().lstrip("-").isdigit():
            return error
        report = explain(int(code), log, what=self._what)
        lost = RunnerLost(str(report))
        lost.report = report
        return lost

    def wait_ready(self) -> None:
        """Wait until it has loaded the model, for as long as that takes.

        Raises
        ------
        ModelLoadError
            It ended instead.
        EngineClosed
            It was stopped.
        """
        from nbinfer.backends.process import as_load_error
        from nbinfer.engines.remote.control import ControlError, call_status

        while not self._ended.wait(_POLL_SECONDS):
            try:
                status, _ = call_status(self.socket, "GET", "/health", timeout=5)
            except ControlError:
                continue
            if status == 200:  # noqa: PLR2004 - OK
                return
        raise as_load_error(self._error or EngineClosed(f"{self._what}: the load was cancelled."))

    def describe(self, *, name: str, mode: Mode, digest: str, version: str) -> EngineInfo:
        """Return what the server says about itself and the model."""
        from nbinfer.engines.protocol import EngineInfo
        from nbinfer.engines.remote.control import call

        props = call(self.socket, "GET", "/props", timeout=10)
        listed = call(self.socket, "GET", "/v1/models", timeout=10).get("data") or [{}]
        meta = listed[0].get("meta") or {}
        settings = props.get("default_generation_settings") or {}
        context, slots = settings.get("n_ctx") or meta.get("n_ctx") or 0, props.get("total_slots") or 1
        return EngineInfo(
            backend=LlamaServerBackend.name,
            model=name,
            mode=mode,
            context_size=int(context),
            trained_context_size=meta.get("n_ctx_train"),
            parallel=int(slots),
            dimensions=meta.get("n_embd") if mode is Mode.EMBEDDING else None,
            digest=digest,
            version=version,
            effective={
                "context_size": context,
                "parallel": slots,
                "vision": bool((props.get("modalities") or {}).get("vision")),
            },
        )

    def engine(self, info: EngineInfo) -> LlamaServerEngine:
        """Return the engine; closing it ends this server."""
        from nbinfer.engines.llamaserver import LlamaServerEngine

        made = LlamaServerEngine(self.socket, info, why=self.why, on_close=self.stop)
        self._engine = made
        if self._ended.is_set() and self._error is not None:
            made.lose(self._error)
        return made

    def why(self) -> NbinferError | None:
        """Wait a moment for the end, and return what it was; None when the server runs."""
        self._ended.wait(_WHY_SECONDS)
        return self._error

    def stop(self) -> None:
        """End it; returns when it is gone. Idempotent."""
        self._control.cancel()
        self._thread.join()


def _short_folder() -> str:
    """Return where the socket's folder goes: a socket's path has little room."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) < 60 and os.access(folder, os.W_OK) else "/tmp"  # noqa: S108, PLR2004
