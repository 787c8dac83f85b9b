"""The llama.cpp adapter: what it says about an installation, without importing it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nbinfer.backends import hardware, llamacpp
from nbinfer.backends.disk import disk_usage
from nbinfer.backends.llamacpp import LlamaCppBackend, install_line
from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import BackendUnavailable, ConfigError, ModelNotFound, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.engines import llamacpp as llamacpp_engine

if TYPE_CHECKING:
    from collections.abc import Callable

LIBRARY = {"linux": "libllama.so", "darwin": "libllama.dylib", "win32": "llama.dll"}.get(
    sys.platform, "libllama.so"
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a folder the only one where packages are installed, and put a llama-cpp-python there."""
    elsewhere = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for name in [name for name in sys.modules if name.split(".")[0] in ("llama_cpp", "vllm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setattr(llamacpp, "_gpu", lambda: None)
    monkeypatch.setattr("nbinfer.processor.has_amx", lambda: False)

    def install(
        version: str | None = None, libraries: tuple[str, ...] | None = None, *, loads: bool = True
    ) -> Path:
        if version is not None:
            info = tmp_path / f"llama_cpp_python-{version}.dist-info"
            info.mkdir()
            text = f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n"
            (info / "METADATA").write_text(text)
        package = tmp_path / "llama_cpp"
        if libraries is not None:
            (package / "lib").mkdir(parents=True)
            (package / "__init__.py").write_text("raise RuntimeError('the engine was imported')")
            for library in libraries:
                (package / "lib" / library).write_bytes(b"not a library")
        if loads:
            monkeypatch.setattr(llamacpp, "_probe", lambda *_: "")
        importlib.invalidate_caches()
        return package

    return install


@pytest.mark.parametrize(
    ("version", "libraries", "text"),
    [
        (None, None, "Not Installed: package not installed"),
        ("0.3.36", None, "Error: import failed"),
        ("0.3.36", (), "Error: binary not found"),
        ("0.3.36", ("libggml-cpu.so",), "Error: binary not found"),
        ("0.3.36", (LIBRARY,), "Running: llama.cpp 0.3.36 (CPU)"),
        ("0.3.40", (LIBRARY, "libggml-cpu.so", "libggml-base.so"), "Running: llama.cpp 0.3.40 (CPU)"),
        ("0.3.36", (LIBRARY, "libggml-cpu.so", "libggml-cuda.so"), "Running: llama.cpp 0.3.36 (CUDA)"),
        ("0.3.36", (LIBRARY, "ggml-cuda.dll"), "Running: llama.cpp 0.3.36 (CUDA)"),
        (
            "0.3.36",
            (LIBRARY, "libggml-metal.dylib", "libggml-blas.dylib"),
            "Running: llama.cpp 0.3.36 (Metal)",
        ),
        ("0.3.36", (LIBRARY, "libggml-vulkan.so"), "Running: llama.cpp 0.3.36 (Vulkan)"),
        (
            "0.3.36",
            (LIBRARY, "libggml-vulkan.so", "libggml-cuda.so.0"),
            "Running: llama.cpp 0.3.36 (CUDA, Vulkan)",
        ),
        ("0.3.36+cu124", (LIBRARY, "libggml-cuda.so"), "Running: llama.cpp 0.3.36+cu124 (CUDA)"),
        (None, (LIBRARY,), "Running: llama.cpp, version unknown (CPU)"),
        ("0.3.35", (LIBRARY,), "Error: llama-cpp-python 0.3.35 is too old"),
        ("0.2.90", (LIBRARY,), "Error: llama-cpp-python 0.2.90 is too old"),
        ("0.4.0", (LIBRARY,), "Error: llama-cpp-python 0.4.0 is too new"),
    ],
)
def test_the_status_follows_from_metadata_and_files(
    site: Callable[..., Path], version: str | None, libraries: tuple[str, ...] | None, text: str
) -> None:
    site(version, libraries)
    backend = LlamaCppBackend()
    assert str(backend.status()) == text
    if text.startswith("Running"):
        backend.install()
    else:
        with pytest.raises(BackendUnavailable, match="pip install"):
            backend.install()
        with pytest.raises(BackendUnavailable, match="pip install"):
            backend.open(Path("x.gguf"), mode=Mode.COMPLETION)


@pytest.mark.skipif(sys.platform == "win32", reason="the loader's words differ")
def test_a_library_that_does_not_load_is_an_error_with_the_loaders_own_words(
    site: Callable[..., Path],
) -> None:
    site("0.3.36", (LIBRARY,), loads=False)
    backend = LlamaCppBackend()
    assert str(backend.status()) == "Error: import failed"
    assert LIBRARY in backend.advice()
    with pytest.raises(BackendUnavailable, match="Error: import failed") as caught:
        backend.install()
    assert len(str(caught.value).splitlines()) <= 5


def test_the_bindings_own_variable_moves_the_library_folder(
    site: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site("0.3.36", ())
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in (LIBRARY, "libggml-cuda.so"):
        (folder / name).write_bytes(b"x")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(folder))
    assert str(LlamaCppBackend().status()) == "Running: llama.cpp 0.3.36 (CUDA)"


def test_a_build_that_does_not_compute_with_the_processors_amx_is_usable_and_can_be_built_better(
    site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site("0.3.36", (LIBRARY,))  # no library at all: trying it fails
    monkeypatch.setattr("nbinfer.processor.has_amx", lambda: True)
    backend = LlamaCppBackend()
    assert backend.status().usable
    assert "AMX" in backend.status().detail
    assert "-fno-tree-dse" in backend.advice()


def test_a_build_for_gpus_is_not_to_be_replaced_for_amx(
    site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site("0.3.36", (LIBRARY, "libggml-cuda.so"))
    monkeypatch.setattr("nbinfer.processor.has_amx", lambda: True)
    monkeypatch.setattr(llamacpp, "_gpu", lambda: "CUDA")
    backend = LlamaCppBackend()
    assert (backend.status().detail, backend.advice()) == ("llama.cpp 0.3.36 (CUDA)", "")


@pytest.mark.parametrize(
    ("libraries", "gpu", "advised"),
    [((LIBRARY,), None, False), ((LIBRARY,), "CUDA", True), ((LIBRARY, "libggml-cuda.so"), "CUDA", False)],
)
def test_a_cpu_build_beside_a_gpu_is_usable_and_advised_against(
    site: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    libraries: tuple[str, ...],
    gpu: str | None,
    advised: bool,
) -> None:
    site("0.3.36", libraries)
    monkeypatch.setattr(llamacpp, "_gpu", lambda: gpu)
    backend = LlamaCppBackend()
    assert backend.status().usable
    assert ("-DGGML_CUDA=on" in backend.advice()) is advised
    assert bool(backend.advice()) is advised


@pytest.mark.parametrize(
    ("platform", "gpu", "again", "line"),
    [
        ("linux", None, False, "pip install 'nbinfer[llamacpp]'"),
        ("darwin", None, False, "pip install 'nbinfer[llamacpp]'"),
        ("win32", None, False, 'pip install "nbinfer[llamacpp]"'),
        ("linux", "CUDA", False, "CMAKE_ARGS=\"-DGGML_CUDA=on\" pip install 'nbinfer[llamacpp]'"),
        ("darwin", "Metal", False, "CMAKE_ARGS=\"-DGGML_METAL=on\" pip install 'nbinfer[llamacpp]'"),
        ("win32", "CUDA", False, '$env:CMAKE_ARGS="-DGGML_CUDA=on"; pip install "nbinfer[llamacpp]"'),
        (
            "linux",
            "CUDA",
            True,
            'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-deps --no-cache-dir '
            "'llama-cpp-python>=0.3.36,<0.4'",
        ),
        (
            "linux",
            None,
            True,
            "pip install --force-reinstall --no-deps --no-cache-dir 'llama-cpp-python>=0.3.36,<0.4'",
        ),
    ],
)
def test_the_install_line_is_the_exact_command(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    gpu: str | None,
    again: bool,
    line: str,
) -> None:
    monkeypatch.setattr(llamacpp, "_gpu", lambda: gpu)
    monkeypatch.setattr(sys, "platform", platform)
    command, _, needs = install_line(again=again).partition("  # ")
    assert command == line
    assert bool(needs) is (gpu is not None)


@pytest.mark.skipif(sys.platform != "linux", reason="the traces are Linux's")
def test_an_nvidia_gpu_is_seen_by_the_traces_of_its_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "_NVIDIA_TRACES", (str(tmp_path / "version"),))
    assert hardware.gpu_kind() is None
    (tmp_path / "version").touch()
    assert hardware.gpu_kind() == "CUDA"


def test_the_supported_versions_are_those_of_the_package_metadata() -> None:
    import tomllib

    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    assert llamacpp._REQUIREMENT in extras["llamacpp"]
    assert (
        f">={'.'.join(map(str, llamacpp.OLDEST))},<{'.'.join(map(str, llamacpp.TOO_NEW[:2]))}"
        in llamacpp._REQUIREMENT
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"mode": Mode.IMAGE_GENERATION}, NotSupported, ["images"]),
        (
            {"mode": Mode.COMPLETION, "treads": 4},
            ConfigError,
            ["'treads'", "Did you mean threads?", "context_size"],
        ),
        (
            {"mode": Mode.COMPLETION, "config": ModelConfig(runtime_flags=["--threads", "4"])},
            ConfigError,
            ["runtime-flags", "threads=4"],
        ),
        (
            {"mode": Mode.COMPLETION, "config": ModelConfig(speculative={"draft_model": "no-such-model"})},
            ModelNotFound,
            ["no-such-model"],
        ),
    ],
)
def test_what_the_engine_does_not_have_is_refused_before_a_file_is_read(
    site: Callable[..., Path], call: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    site("0.3.36", (LIBRARY,))
    with pytest.raises(error) as caught:
        LlamaCppBackend().open(Path("/no/such/file.gguf"), **call)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) <= 5


def test_a_configuration_becomes_the_engines_options(
    site: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site("0.3.36", (LIBRARY,))
    calls: list[dict[str, Any]] = []

    def open_engine(path: Path, *, mode: Mode, name: str, **options: Any) -> None:
        calls.append({"path": path, "mode": mode, "name": name, **options})

    keywords = inspect.signature(llamacpp_engine.open_engine)
    open_engine.__signature__ = keywords  # type: ignore[attr-defined]
    monkeypatch.setattr(llamacpp_engine, "open_engine", open_engine)
    config = ModelConfig(
        context_size=512,
        keep_alive="1h",
        speculative={"num_tokens": 3, "min_acceptance_rate": 0.25},
        vllm={"gpu-memory-utilization": 0.5},
        llamacpp={"reasoning-budget": 0},
    )
    LlamaCppBackend().open(
        Path("m.gguf"), mode=Mode.EMBEDDING, name="m", config=config, threads=2, context_size=256
    )
    assert calls == [
        {
            "path": Path("m.gguf"),
            "mode": Mode.EMBEDDING,
            "name": "m",
            "threads": 2,
            "context_size": 256,
            "reasoning_budget": 0,
            "speculative": llamacpp_engine.Speculative(num_tokens=3, min_acceptance_rate=0.25),
        }
    ]


def test_disk_usage_is_that_of_the_package(site: Callable[..., Path]) -> None:
    assert LlamaCppBackend().disk_usage() == 0
    package = site("0.3.36", (LIBRARY,))
    size = (package / "__init__.py").stat().st_size + len(b"not a library")
    assert LlamaCppBackend().disk_usage() == size


def test_links_to_one_file_count_once(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "a"
    blob.parent.mkdir()
    blob.write_bytes(b"x" * 1000)
    store = tmp_path / "store"
    (store / "loop").mkdir(parents=True)
    (store / "own").write_bytes(b"y" * 10)
    os.link(blob, store / "hard")
    (store / "soft").symlink_to(blob)
    (store / "gone").symlink_to(tmp_path / "nothing")
    (store / "loop" / "back").symlink_to(store)
    assert disk_usage([store]) == 1010
    assert disk_usage([store, blob, store / "own", tmp_path / "nothing"]) == 1010
    assert disk_usage([]) == 0


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_the_installed_llama_cpp_loads_in_a_process_of_its_own() -> None:
    package = llamacpp._package()
    assert package is not None
    library = llamacpp._library(llamacpp._library_folder(package))
    assert library is not None
    assert llamacpp._probe(library, 0, 0) == ""
    assert str(LlamaCppBackend().status()).startswith("Running: llama.cpp 0.")
