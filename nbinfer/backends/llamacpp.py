"""The llama.cpp backend: GGUF models, through the llama-cpp-python bindings.

Whether it is usable is found out without importing it: from the distribution's metadata, from the names of
the libraries beside it, and from a child process that loads them once.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.backends.disk import disk_usage
from nbinfer.backends.hardware import gpu_kind as _gpu
from nbinfer.contract import status as words
from nbinfer.contract.errors import BackendUnavailable, ConfigError, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.contract.status import BackendStatus, StatusWord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nbinfer.backends.process import RunControl
    from nbinfer.contract.config import ModelConfig, SpeculativeConfig
    from nbinfer.engines.llamacpp import Speculative
    from nbinfer.engines.protocol import Engine

DISTRIBUTION = "llama-cpp-python"
# The bindings change with llama.cpp's C interface; the engine is written against these.
OLDEST = (0, 3, 36)
TOO_NEW = (0, 4, 0)
_REQUIREMENT = f"{DISTRIBUTION}>=0.3.36,<0.4"

# What a ggml library's file name says about the build, in the order in which it is shown.
_BUILDS = {
    "cuda": "CUDA",
    "hip": "ROCm",
    "metal": "Metal",
    "vulkan": "Vulkan",
    "sycl": "SYCL",
    "opencl": "OpenCL",
    "musa": "MUSA",
    "cann": "CANN",
}
_WITHOUT_AMX = "without AMX, which this build does not compute with"
_PROBE_SECONDS = 30
_PROBE = """
import ctypes, os, sys
folder, library = os.path.split(sys.argv[1])
if sys.platform == "win32":
    os.add_dll_directory(folder)
    for name, parts in (("CUDA_PATH", ("bin", "lib")), ("HIP_PATH", ("bin", "lib"))):
        for part in parts if name in os.environ else ():
            if os.path.isdir(os.path.join(os.environ[name], part)):
                os.add_dll_directory(os.path.join(os.environ[name], part))
try:
    ctypes.CDLL(sys.argv[1])
except OSError as error:
    sys.exit(str(error))
"""


def _whole(value: str) -> int:
    return int(value)


def _switch(value: str) -> bool | None:
    return {"on": True, "1": True, "true": True, "off": False, "0": False, "false": False, "auto": None}[
        value
    ]


def _split(value: str) -> list[float]:
    return [float(part) for part in value.split(",")]


# Flags of llama.cpp's own server: the engine's option, and how its value is read (None: it takes none).
_FLAGS: dict[str, tuple[str, Callable[[str], Any] | None]] = {
    **dict.fromkeys(("--threads", "-t"), ("threads", _whole)),
    **dict.fromkeys(("--ctx-size", "-c"), ("context_size", _whole)),
    **dict.fromkeys(("--parallel", "-np"), ("parallel", _whole)),
    **dict.fromkeys(("--gpu-layers", "--n-gpu-layers", "-ngl"), ("gpu_layers", _whole)),
    **dict.fromkeys(("--batch-size", "-b"), ("batch_size", _whole)),
    **dict.fromkeys(("--ubatch-size", "-ub"), ("micro_batch", _whole)),
    **dict.fromkeys(("--flash-attn", "-fa"), ("flash_attention", _switch)),
    **dict.fromkeys(("--cache-type-k", "-ctk", "--cache-type-v", "-ctv"), ("kv_type", str)),
    **dict.fromkeys(("--main-gpu", "-mg"), ("main_gpu", _whole)),
    **dict.fromkeys(("--tensor-split", "-ts"), ("tensor_split", _split)),
    "--reasoning-budget": ("reasoning_budget", _whole),
    "--no-mmap": ("mmap", None),
}


def flag_options(flags: Sequence[str]) -> dict[str, Any]:
    """Return the engine's options that a list of llama.cpp's flags stands for.

    Raises
    ------
    ConfigError
        A flag is not one of these, or its value cannot be read.
    """
    from nbinfer.contract.flags import check_flags

    items = list(check_flags(list(flags), _FLAGS, backend="llamacpp"))
    options: dict[str, Any] = {}
    while items:
        flag, joined, value = items.pop(0).partition("=")
        if flag not in _FLAGS:
            raise ConfigError(f"runtime-flags: {flag!r:.60} follows a flag that takes no value.")
        option, read = _FLAGS[flag]
        if read is None:
            options[option] = False
            continue
        if not joined:
            value = items.pop(0) if items else ""
        try:
            options[option] = read(value)
        except (ValueError, KeyError):
            raise ConfigError(f"runtime-flags: {value!r:.60} is not a value of {flag}.") from None
    return options


class LlamaCppBackend:
    """llama.cpp through llama-cpp-python."""

    name = "llamacpp"
    formats = ("gguf",)
    allowed_flags = frozenset(_FLAGS)
    uses_external_model_management = False
    uses_tcp = False

    def status(self) -> BackendStatus:
        """Look at the package's metadata and files; load its library in a child process, once."""
        return self._look()[0]

    def advice(self) -> str:
        """Return the command that installs it, or that brings a build for this machine's GPU."""
        return self._look()[1]

    def _look(self) -> tuple[BackendStatus, str]:
        package = _package()
        version = _version()
        if package is None:
            if version is None:
                return BackendStatus(StatusWord.NOT_INSTALLED, words.PACKAGE_NOT_INSTALLED), install_line()
            return BackendStatus(StatusWord.ERROR, words.IMPORT_FAILED), install_line(again=True)
        numbers = _numbers(version)
        if numbers is not None and not OLDEST <= numbers < TOO_NEW:
            detail = f"{DISTRIBUTION} {version} is too {'old' if numbers < OLDEST else 'new'}"
            return BackendStatus(StatusWord.ERROR, detail), install_line(again=True)
        folder = _library_folder(package)
        library = _library(folder)
        if library is None:
            return BackendStatus(StatusWord.ERROR, words.BINARY_NOT_FOUND), install_line(again=True)
        problem = _load_problem(library)
        if problem:
            return BackendStatus(
                StatusWord.ERROR, words.IMPORT_FAILED
            ), f"{problem}\n{install_line(again=True)}"
        builds = _builds(folder)
        detail = f"llama.cpp {version}" if version else f"llama.cpp, {words.VERSION_UNKNOWN}"
        found = BackendStatus(StatusWord.RUNNING, f"{detail} ({', '.join(builds)})")
        gpu = _gpu()
        if gpu is not None and builds == ["CPU"]:
            return found, install_line(again=True)
        # A build for GPUs leaves weights in main memory as they are, and another one would lose the GPU.
        if builds == ["CPU"] and _amx_is_broken(library):
            return BackendStatus(StatusWord.RUNNING, f"{found.detail}; {_WITHOUT_AMX}"), _amx_line()
        return found, ""

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
        """Load a GGUF file into this process; the options are those of the engine.

        Raises
        ------
        BackendUnavailable
            llama.cpp is not usable here; the message is the exact install line.
        NotSupported
            The mode or a setting is not one that this engine has in the kernel.
        ConfigError
            There is no such option.
        ModelLoadError
            The file cannot be loaded.
        """
        options = {**_options(config), **options}
        self.check(mode, options)
        self.install()
        from nbinfer.engines.llamacpp import open_engine

        # A path that came as JSON, to a process of its own.
        if isinstance(options.get("projector"), str):
            options["projector"] = Path(options["projector"])
        return open_engine(path, mode=mode, name=name, **options)

    def check(self, mode: Mode, options: Mapping[str, Any]) -> None:
        """Refuse a mode that it does not serve, and an option that it does not have.

        Raises
        ------
        ConfigError, NotSupported
            As :meth:`open` does.
        """
        from nbinfer.engines.llamacpp import open_engine

        if mode is Mode.IMAGE_GENERATION:
            raise NotSupported(
                "llamacpp does not generate images; it serves completion, embedding and reranking."
            )
        known = [
            key
            for key, kind in inspect.signature(open_engine).parameters.items()
            if kind.kind is kind.KEYWORD_ONLY
        ]
        for option in options:
            if option not in known:
                raise ConfigError(_unknown(option, known))

    def flag_options(self, flags: Sequence[str]) -> dict[str, Any]:
        """Return the engine's options that a list of flags stands for; see :func:`flag_options`."""
        return flag_options(flags)

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
        """Serve one model at a Unix socket, in a process of its own; return when that has ended.

        Raises
        ------
        BackendUnavailable
            llama.cpp is not usable here; the message is the exact install line.
        ConfigError
            A runtime flag is not one of ``allowed_flags``.
        ModelLoadError, NotSupported
            The model cannot be loaded.
        RunnerLost
            The process crashed; the message is the crash report.
        """
        from nbinfer.backends.process import RunControl, serve_engine

        self.install()
        control = control or RunControl()
        control.options = {**flag_options(config.runtime_flags or ()), **control.options}
        serve_engine(self.name, socket, model, model_ref, mode, config.without("runtime-flags"), control)

    def disk_usage(self) -> int:
        """Bytes of the installed package, its libraries included; 0 when it is not installed."""
        package = _package()
        return 0 if package is None else disk_usage([package, _library_folder(package)])


def install_line(*, again: bool = False) -> str:
    """Return the command that installs llama.cpp with the build that suits this machine.

    Parameters
    ----------
    again
        A package is there already and must be replaced.
    """
    # --no-deps --no-cache-dir: the same version is built anew, and nothing else is touched.
    what = (
        f"--force-reinstall --no-deps --no-cache-dir {_quote(_REQUIREMENT)}"
        if again
        else _quote("nbinfer[llamacpp]")
    )
    gpu = _gpu()
    if gpu is None:
        return f"pip install {what}"
    option = f"-DGGML_{gpu.upper()}=on"
    needs = "Xcode's command line tools" if gpu == "Metal" else "a C++ compiler and the CUDA toolkit"
    setting = f'$env:CMAKE_ARGS="{option}";' if sys.platform == "win32" else f'CMAKE_ARGS="{option}"'
    return f"{setting} pip install {what}  # builds llama.cpp: needs {needs}"


def _amx_is_broken(library: Path) -> bool:
    """Whether the processor has AMX and this build does not compute with it; the engine goes on without."""
    from nbinfer.processor import amx, has_amx

    return has_amx() and amx.is_broken(str(library))


def _amx_line() -> str:
    from nbinfer.processor.amx import FLAGS

    rebuilt = f"--force-reinstall --no-deps --no-cache-dir --no-binary {DISTRIBUTION} {_quote(_REQUIREMENT)}"
    return f"CXXFLAGS={_quote(FLAGS)} pip install {rebuilt}  # builds llama.cpp: prompts 2 to 4 times as fast"


def _quote(text: str) -> str:
    return f'"{text}"' if sys.platform == "win32" else f"'{text}'"


def _package() -> Path | None:
    for attempt in range(2):
        try:
            spec = importlib.util.find_spec("llama_cpp")
        except ValueError:  # something in sys.modules that was not imported
            return None
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
        if attempt == 0:
            # A package installed a moment ago, from a notebook cell, is not in the finders' caches yet.
            importlib.invalidate_caches()
    return None


def _version() -> str | None:
    try:
        # None where the metadata is broken.
        return metadata.version(DISTRIBUTION) or None
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str | None) -> tuple[int, int, int] | None:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def _library_folder(package: Path) -> Path:
    # The same variable that the bindings obey.
    return Path(os.environ.get("LLAMA_CPP_LIB_PATH") or package / "lib")


def _library(folder: Path) -> Path | None:
    names = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}
    for name in names.get(sys.platform, ("libllama.so",)):
        if (folder / name).exists():
            return folder / name
    return None


def _builds(folder: Path) -> list[str]:
    names = [file.name.lower() for file in folder.iterdir() if "ggml-" in file.name.lower()]
    found = [label for key, label in _BUILDS.items() if any(f"ggml-{key}" in name for name in names)]
    return found or ["CPU"]


def _load_problem(library: Path) -> str:
    """Return why the library does not load; empty when it does."""
    if "llama_cpp.llama_cpp" in sys.modules or not sys.executable:
        return ""
    found = library.stat()
    return _probe(library, found.st_mtime_ns, found.st_size)


@cache
def _probe(library: Path, mtime: int, size: int) -> str:
    del mtime, size  # another file under the same name is probed again
    # Isolated and without site: nothing but the library is loaded, which takes about 30 ms.
    command = [sys.executable, "-I", "-S", "-c", _PROBE, str(library)]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and program
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:300]
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"loading the library ended with exit code {done.returncode}"


def _options(config: ModelConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    if config.runtime_flags:
        raise ConfigError(
            "runtime-flags are for a server's command line; a model in the kernel takes options by name, "
            "as in load(…, threads=4).",
        )
    budget = None if config.llamacpp is None else config.llamacpp.reasoning_budget
    asked = {
        "context_size": config.context_size,
        "reasoning_budget": budget,
        "speculative": _speculative(config.speculative),
    }
    return {key: value for key, value in asked.items() if value is not None}


def _speculative(asked: SpeculativeConfig | None) -> Speculative | None:
    if asked is None:
        return None
    from nbinfer.engines.llamacpp import Speculative
    from nbinfer.models import resolve

    draft = None if asked.draft_model is None else resolve(asked.draft_model).path
    return Speculative(
        draft_path=draft, num_tokens=asked.num_tokens, min_acceptance_rate=asked.min_acceptance_rate
    )


def _unknown(option: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(option, known, n=1)
    advice = f" Did you mean {near[0]}?" if near else ""
    shown = ", ".join(key for key in known if key not in ("mode", "name", "digest", "on_progress"))
    return f"llamacpp has no option {option!r}.{advice}\nOptions: {shown}."
