"""The parent's side of the probe: starts the child, asks it, ends it, and starts another after a crash."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NbinferError

if TYPE_CHECKING:
    from collections.abc import Sequence

# The package without its `__init__` files: the child imports the standard library and these modules only.
# An interrupt of the kernel reaches its whole group, and is not a failure of the probe.
_BOOT = """
import signal, sys, types
signal.signal(signal.SIGINT, signal.SIG_IGN)
folder, library, space = sys.argv[1:]
for below in ("", "/memory", "/memory/probe"):
    package = types.ModuleType("nbinfer" + below.replace("/", "."))
    package.__path__ = [folder + below]
    sys.modules[package.__name__] = package
from nbinfer.memory.probe.worker import main
main(library, int(space))
"""
_ADDRESS_SPACE = 8 << 30
_START_SECONDS = 30.0
_ANSWER_SECONDS = 20.0
_TAIL_BYTES = 4096


class ProbeUnavailable(NbinferError, RuntimeError):  # noqa: N818 - a state, as BackendUnavailable
    """The probe cannot be used here; the message says why. The analytic estimate still can."""


class ProbeFailed(NbinferError, RuntimeError):  # noqa: N818 - what happened, said in its message
    """The probe's process died or did not answer in time; the next request starts another."""


class ProbeRefused(NbinferError, ValueError):  # noqa: N818 - llama.cpp's answer
    """llama.cpp itself will not load this model or make this context; the message is its own."""


_OUT_OF_MEMORY = "std::bad_alloc"


@dataclass(frozen=True, slots=True, kw_only=True)
class PretendGPU:
    """A GPU to plan for.

    ``total`` and ``free`` are in bytes; llama.cpp splits layers over several by ``free``. ``integrated``: it
    shares the host's memory.
    """

    name: str = "CUDA0"
    description: str = "GPU"
    total: int = 0
    free: int = 0
    integrated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferRow:
    """What llama.cpp keeps in one kind of buffer, in bytes."""

    buffer: str
    device: str
    host: bool
    model: int
    context: int
    compute: int

    @property
    def copied(self) -> bool:
        """Whether weights here are copied out of the file, for the processor, also where it is mapped.

        The probe maps nothing: ``CPU_Mapped`` is where it puts what must not be rearranged.
        """
        return self.buffer in ("AMX", "CPU_Mapped") or "REPACK" in self.buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """llama.cpp's plan: rows by buffer type, and the numbers it settled on (tokens, sequences)."""

    rows: tuple[BufferRow, ...]
    context_size: int
    context_per_sequence: int
    batch: int
    micro_batch: int
    sequences: int
    flash_attention: bool
    seconds: float = field(default=0.0, compare=False)

    def on(self, device: str) -> BufferRow:
        """Return the sum of the rows of one device by name; ``"CPU"`` is everything in host memory."""
        rows = [row for row in self.rows if ("CPU" if row.host else row.device) == device]
        return BufferRow(
            buffer="+".join(row.buffer for row in rows),
            device=device,
            host=device == "CPU",
            model=sum(row.model for row in rows),
            context=sum(row.context for row in rows),
            compute=sum(row.compute for row in rows),
        )


def library_folder() -> Path:
    """Return the folder of llama-cpp-python's libraries without importing it.

    Raises
    ------
    ProbeUnavailable
        llama-cpp-python is not installed.
    """
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.origin:
        raise ProbeUnavailable("llama-cpp-python is not installed: pip install 'nbinfer[llamacpp]'")
    return Path(spec.origin).parent / "lib"


class Probe:
    """Asks llama.cpp, in a child process, what it would allocate.

    Parameters
    ----------
    folder
        Where llama's library lies; by default that of the installed llama-cpp-python.
    timeout
        Seconds that one answer may take before the child is ended.
    address_space
        The most bytes of address space that the child may use.
    environment
        Set or changed in the child's environment.

    Notes
    -----
    Starts on the first request. Safe to use from several threads; requests run one at a time. A child that
    dies (an assertion of llama.cpp on a broken header) or hangs fails that request only. A failed self-test
    switches the probe off for good, with the reason in ``status``.
    """

    def __init__(
        self,
        *,
        folder: str | os.PathLike[str] | None = None,
        timeout: float = _ANSWER_SECONDS,
        address_space: int = _ADDRESS_SPACE,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._timeout = timeout
        self._address_space = address_space
        self._environment = environment or {}
        self._lock = threading.RLock()
        self._child: _Child | None = None
        self._end_with_us: Any = None
        self._header = ""
        self._off = ""

    @property
    def status(self) -> str:
        """``"ready"``, ``"not started"``, or why the probe is switched off."""
        if self._off:
            return f"off: {self._off}"
        return "ready" if self.pid else "not started"

    def works(self) -> bool:
        """Start the child if none runs; whether it passed its self-test."""
        with self._lock:
            try:
                self._start()
            except ProbeUnavailable:
                return False
            return True

    @property
    def pid(self) -> int | None:
        """The child's process id, or None while none runs."""
        child = self._child
        return child.process.pid if child is not None and child.alive() else None

    def measure(
        self,
        header: bytes,
        size: int,
        *,
        devices: Sequence[PretendGPU] = (),
        model: dict[str, Any] | None = None,
        context: dict[str, Any] | None = None,
    ) -> Measurement:
        """Return what llama.cpp would allocate for this model with these settings.

        Parameters
        ----------
        header
            The GGUF header, best without its vocabulary (70 times faster).
        size
            The size of the whole file in bytes.
        devices
            The GPUs to plan for; none means the CPU alone.
        model, context
            Fields of ``llama_model_params`` and ``llama_context_params`` that differ from their defaults.
            ``model`` also takes ``tensor_split`` (a list of shares) and ``experts_on_cpu`` (a list of regular
            expressions of tensor names).

        Raises
        ------
        ProbeUnavailable
            The probe cannot be used here.
        ProbeRefused
            llama.cpp will not run this.
        ProbeFailed
            The child died or did not answer in time.
        """
        request = {
            "op": "measure",
            "devices": [
                {
                    "name": gpu.name,
                    "description": gpu.description,
                    "total": gpu.total,
                    "free": gpu.free,
                    "integrated": gpu.integrated,
                }
                for gpu in devices
            ],
            "model": model or {},
            "context": context or {},
        }
        key = hashlib.sha256(header + size.to_bytes(8, "little")).hexdigest()
        with self._lock:
            self._start()
            if key != self._header:
                self._ask({"op": "header", "header": base64.b64encode(header).decode(), "size": size})
                self._header = key
            answer = self._ask(request)
        return Measurement(
            rows=tuple(BufferRow(**row) for row in answer["rows"]),
            context_size=answer["n_ctx"],
            context_per_sequence=answer["n_ctx_seq"],
            batch=answer["n_batch"],
            micro_batch=answer["n_ubatch"],
            sequences=answer["n_seq_max"],
            flash_attention=answer["flash_attention"],
        )

    def devices(self) -> list[dict[str, Any]]:
        """Return the devices that ggml itself sees, CUDA and HIP ones hidden: a driver's tool knows those.

        Raises
        ------
        ProbeUnavailable, ProbeFailed
            As for ``measure``.
        """
        with self._lock:
            self._start()
            found: list[dict[str, Any]] = self._ask({"op": "devices"})["devices"]
            return found

    def close(self) -> None:
        """End the child; the next request starts another."""
        with self._lock:
            self._end()

    # -- the child ---------------------------------------------------------------------------------------

    def _start(self) -> _Child:
        if self._off:
            raise ProbeUnavailable(f"the exact probe is switched off: {self._off}")
        if self._child is not None and self._child.alive():
            return self._child
        self._end()
        self._child = child = _Child(self._folder or library_folder(), self._address_space, self._environment)
        # The child ends with this object, or with the interpreter, whoever forgets to close it.
        self._end_with_us = weakref.finalize(self, child.end)
        try:
            answer = child.receive(_START_SECONDS)
            self._off = "" if answer["ready"] else answer["why"]
        except ProbeFailed as failure:
            # One that cannot even start would not start the next time either.
            self._off = str(failure)
        except BaseException:
            self._end()
            raise
        if self._off:
            self._end()
            raise ProbeUnavailable(f"the exact probe is switched off: {self._off}")
        return child

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._start().ask(request, self._timeout)
        except BaseException:
            # Also an interrupt: what the child says after it must not be taken for the next answer.
            self._end()
            raise
        if answer["ok"]:
            return answer
        # Bookkeeping alone was more than the child is given: that is no answer about the model.
        if answer["refused"] and _OUT_OF_MEMORY not in answer["why"]:
            raise ProbeRefused(f"llama.cpp refuses: {answer['why']}")
        raise ProbeFailed(f"the probe failed: {answer['why']}")

    def _end(self) -> None:
        self._child, self._header = None, ""
        if self._end_with_us is not None:
            self._end_with_us()


class _Child:
    """One running child process."""

    def __init__(self, folder: str | os.PathLike[str], space: int, environment: dict[str, str]) -> None:
        # A file, because a pipe that nobody reads fills up and blocks the child.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open for the life of the child
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own code
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                _BOOT,
                str(Path(__file__).parents[2]),
                str(folder),
                str(space),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                # Or ggml starts a debugger at each abort, which takes seconds.
                "GGML_NO_BACKTRACE": "1",
                # No real GPU is needed, and a context on one costs hundreds of megabytes.
                "CUDA_VISIBLE_DEVICES": "",
                "HIP_VISIBLE_DEVICES": "",
                **environment,
            },
        )
        self._owner = os.getpid()
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._pump = threading.Thread(
            target=_pump, args=(self.process.stdout, self._answers), name="nbinfer-probe", daemon=True
        )
        self._pump.start()

    def alive(self) -> bool:
        # After a fork the pipes are shared with the parent: the copy starts a child of its own.
        return self._owner == os.getpid() and self.process.poll() is None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        stdin = self.process.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
        except OSError:
            raise ProbeFailed(f"the probe ended: {self._last_words()}") from None
        return self.receive(seconds)

    def receive(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise ProbeFailed(f"the probe did not answer within {seconds:g} seconds") from None
        if not line:
            raise ProbeFailed(f"the probe ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        """Return how the child ended and the last line that says why."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2)
        code = self.process.returncode
        how = "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
        length = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, length - _TAIL_BYTES))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        asserted = [line for line in lines if "GGML_ASSERT" in line or "Error" in line]
        text = (asserted or lines or [""])[-1].strip()
        return f"{how}; {text}" if text else how

    def end(self) -> None:
        if self._owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self._pump.join(timeout=2)  # it closes stdout
            if self.process.stdin is not None:
                with contextlib.suppress(OSError):
                    self.process.stdin.close()
        self._errors.close()


def _pump(stream: Any, answers: queue.SimpleQueue[bytes]) -> None:
    """Carry lines from the child to the queue; an empty one says that it ended."""
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(b"")


_shared: Probe | None = None
_shared_lock = threading.Lock()


def shared_probe() -> Probe:
    """Return this process's probe, made on the first call."""
    global _shared  # noqa: PLW0603 - one child process per interpreter
    with _shared_lock:
        if _shared is None:
            _shared = Probe()
        return _shared
