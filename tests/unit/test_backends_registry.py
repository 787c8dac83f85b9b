"""The registry: what other distributions bring, and that a broken one breaks nothing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from nbinfer import backends
from nbinfer.backends.registry import BUILT_IN
from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import BackendUnavailable, ConfigError, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.contract.status import BackendStatus, StatusWord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GOOD = """
class Adapter:
    name = "{name}"
    formats = ("onnx",)
    allowed_flags = frozenset()
    uses_external_model_management = False
    uses_tcp = True

    def status(self):
        {status}

    def advice(self):
        return ""

    def install(self): ...
    def open(self, path, **options):
        return path, options
    def run(self, *arguments): ...
    def disk_usage(self):
        return 7

def make():
    return Adapter()

instance = Adapter()
"""
RUNNING = "from nbinfer.contract.status import BackendStatus; return BackendStatus.parse('Running: ort 1')"


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution with one module and one entry point of ours."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules: list[str] = []

    def install(point: str, source: str, attribute: str = "Adapter", *, module: str = "") -> None:
        module = module or f"adapter_{len(modules)}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nbinfer.backends]\n{point} = {module}:{attribute}\n")
        importlib.invalidate_caches()
        backends.refresh()

    yield install
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    importlib.invalidate_caches()
    backends.refresh()


def status_of(name: str) -> tuple[BackendStatus, str]:
    return next((status, advice) for row, status, advice in backends.statuses() if row == name)


def test_the_built_in_backends_are_there_once_though_one_has_an_entry_point_too() -> None:
    names = [name for name, _, _ in backends.statuses()]
    assert sorted(names) == sorted(BUILT_IN)
    assert type(backends.get("llamacpp")).__name__ == "LlamaCppBackend"


def test_listing_every_status_imports_no_engine() -> None:
    program = (
        "import sys; from nbinfer import backends; backends.statuses(); "
        "print({'llama_cpp', 'vllm', 'torch', 'numpy', 'pandas', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("attribute", ["Adapter", "make", "instance"])
def test_another_distribution_adds_a_backend(distribution: Callable[..., None], attribute: str) -> None:
    distribution("onnx", GOOD.format(name="onnx", status=RUNNING), attribute)
    assert status_of("onnx") == (BackendStatus(StatusWord.RUNNING, "ort 1"), "")
    assert backends.for_format("onnx").name == "onnx"
    assert backends.for_format("onnx", "onnx").disk_usage() == 7
    assert set(backends.backends()) == {*BUILT_IN, "onnx"}


@pytest.mark.parametrize(
    ("point", "source", "detail", "reason"),
    [
        ("third", "import no_such_module_at_all", "import failed", "no_such_module_at_all"),
        ("third", "raise RuntimeError('two\\nlines')", "import failed", "RuntimeError: two lines"),
        ("third", "import sys; sys.exit(3)", "import failed", "SystemExit: 3"),
        ("third", "x = 1", "import failed", "AttributeError"),
        ("third", "def Adapter(): raise OSError('no device')", "import failed", "OSError: no device"),
        ("third", "def", "import failed", "SyntaxError"),
        ("third", "class Adapter:\n    name = 'third'", "not a backend", "it has no formats"),
        ("third", GOOD.format(name="other", status=RUNNING), "bad name", "calls itself 'other'"),
        ("Third", GOOD.format(name="Third", status=RUNNING), "bad name", "lower-case"),
        ("a_b", GOOD.format(name="a_b", status=RUNNING), "bad name", "lower-case"),
    ],
)
def test_a_broken_backend_is_an_error_in_the_list_and_never_an_exception(
    distribution: Callable[..., None], point: str, source: str, detail: str, reason: str
) -> None:
    distribution(point, source)
    status, advice = status_of(point)
    assert (status.word, status.detail) == (StatusWord.ERROR, detail)
    assert reason in advice
    assert advice.startswith("adapter_0: ")
    assert "llamacpp" in [name for name, _, _ in backends.statuses()]
    broken = backends.get(point)
    calls: list[Callable[[], Any]] = [
        broken.install,
        lambda: broken.open(None, mode=Mode.COMPLETION),  # type: ignore[arg-type]
        lambda: broken.run("s", None, "m", Mode.COMPLETION, ModelConfig()),  # type: ignore[arg-type]
        lambda: backends.for_format("gguf", point),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailable, match=detail) as caught:
            call()
        assert len(str(caught.value).splitlines()) <= 5
    assert broken.disk_usage() == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("raise OSError('gone')", "Error: OSError: gone"),
        ("return 'Running: x'", "Running: x"),
        ("return 'whatever'", "Error: whatever"),
        ("return None", "Error: None"),
    ],
)
def test_whatever_a_status_call_does_is_a_status(
    distribution: Callable[..., None], body: str, status: str
) -> None:
    distribution("third", GOOD.format(name="third", status=body))
    assert str(status_of("third")[0]) == status


def test_nothing_replaces_a_built_in_backend(distribution: Callable[..., None]) -> None:
    distribution("llamacpp", GOOD.format(name="llamacpp", status=RUNNING))
    assert type(backends.get("llamacpp")).__name__ == "LlamaCppBackend"


def test_usable_backends_come_first_then_errors_then_names(distribution: Callable[..., None]) -> None:
    distribution("zzz", GOOD.format(name="zzz", status="return 'Running'"))
    distribution("bbb", GOOD.format(name="bbb", status="return 'Error: x'"))
    distribution("aaa", GOOD.format(name="aaa", status="return 'Installing'"))
    order = [name for name, _, _ in backends.statuses() if name not in BUILT_IN]
    assert order == ["zzz", "bbb", "aaa"]


@pytest.mark.parametrize("name", ["a", "llamacpp", "llama.cpp", "my-engine2", "0x", "a" * 32])
def test_names_that_fit_urls_and_socket_paths(name: str) -> None:
    assert backends.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "Llama",
        "a_b",
        "a b",
        "a/b",
        "-a",
        "a-",
        ".a",
        "a.",
        "a..b",
        "..",
        "a\n",
        "\u00fc",
        "a" * 33,
        None,
        5,
    ],
)
def test_names_that_do_not(name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot name a backend"):
        backends.check_name(name)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("gguf", "llamacp"), ConfigError, ["Did you mean llamacpp?", "Backends: llamacpp, "]),
        (("gguf", "LLAMACPP"), ConfigError, ["Did you mean llamacpp?"]),
        (("gguf", "zzz"), ConfigError, ["Backends: llamacpp, "]),
        (("gguf", "vllm"), NotSupported, ["vllm runs safetensors", "backend=llamacpp"]),
        (("safetensors", "llamacpp"), NotSupported, ["llamacpp runs gguf", "backend=vllm"]),
        (("ddup", None), NotSupported, ["diffusers, gguf, safetensors"]),
        (("safetensors", None), BackendUnavailable, ["vllm", "GGUF file of the model"]),
    ],
)
def test_a_choice_that_cannot_run_the_file_is_refused_with_the_fix(
    arguments: tuple[str, str | None], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        backends.for_format(*arguments)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) <= 5
