"""%nbinfer: each subcommand is one call of the Python API, with its value as the cell's value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from IPython.core.error import UsageError
from support.fake_engine import FakeEngine
from support.notebook import Notebook, notebook

from nbinfer import session
from nbinfer.contract.status import BackendStatus
from nbinfer.magics import commands
from nbinfer.magics.options import COMMANDS
from nbinfer.memory import Gpu, Machine, Ram
from nbinfer.session import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def nb() -> Iterator[Notebook]:
    with notebook() as opened:
        yield opened


@pytest.fixture
def load_calls(nb: Notebook, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Record what would be loaded: a file is a matter of the engine's tests."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def load(ref: str, *, progress: Callable[[float], None], **options: Any) -> Model:
        calls.append((ref, options))
        progress(0.5)
        return nb.add(FakeEngine(), options.get("name") or ref)

    monkeypatch.setattr(session, "load", load)
    return calls


@pytest.mark.parametrize(
    ("line", "ref", "options"),
    [
        ("demo", "demo", {}),
        (
            "demo --name tiny -c 512 --parallel 2",
            "demo",
            {"name": "tiny", "context_size": 512, "parallel": 2},
        ),
        (
            "demo -c -1 --keep-alive 5m --force",
            "demo",
            {"context_size": -1, "keep_alive": "5m", "force": True},
        ),
        ("'my models/a.gguf' --mode embedding", "my models/a.gguf", {"mode": "embedding"}),
        ("demo -p threads=2 -p mmap=false", "demo", {"threads": 2, "mmap": False}),
        ("demo --speculative", "demo", {"speculative": {}}),
        ("demo --speculative=small", "demo", {"speculative": {"draft_model": "small"}}),
    ],
)
def test_load_passes_its_options_on(
    nb: Notebook, load_calls: list[tuple[str, dict[str, Any]]], line: str, ref: str, options: dict[str, Any]
) -> None:
    model = nb.run(f"%nbinfer load {line}")
    assert load_calls == [(ref, options)]
    assert isinstance(model, Model)
    assert nb.outputs == []  # a quick load needs no progress


def test_a_long_load_says_how_far_it_is(
    nb: Notebook, load_calls: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_SHOW_AFTER", 0.0)
    nb.run("%nbinfer load demo")
    assert nb.texts[0] == "loading demo: 50%"
    assert nb.texts[-1].startswith("loading demo took")
    assert [output["update"] for output in nb.outputs] == [False, True]


def test_loaded_models_are_listed_and_unloaded(nb: Notebook) -> None:
    nb.add(FakeEngine(), "a")
    nb.add(FakeEngine(), "b")
    frame = nb.run("%nbinfer ps")
    assert list(frame["name"]) == ["a", "b"]
    nb.run("%nbinfer unload a")
    assert [m.name for m in session.loaded()] == ["b"]
    nb.run("%nbinfer unload")
    assert session.loaded() == []


def test_backends_are_listed_with_a_badge(nb: Notebook) -> None:
    frame = nb.run("%nbinfer status")
    assert "llamacpp" in list(frame["backend"])
    data, _ = nb.shell.display_formatter.format(frame)
    assert 'class="nbinfer-badge' in data["text/html"]
    assert "text/markdown" not in data


def test_aliases_are_made_listed_and_removed(nb: Notebook) -> None:
    nb.run("%nbinfer alias q path/to/file.gguf")
    assert nb.run("%nbinfer alias q") == "path/to/file.gguf"
    assert nb.run("%nbinfer alias").to_dict("records") == [{"alias": "q", "stands for": "path/to/file.gguf"}]
    nb.run("%nbinfer alias --remove q")
    assert len(nb.run("%nbinfer alias")) == 0


def test_values_of_the_notebook_go_into_commands(nb: Notebook) -> None:
    nb.set(where="some folder/model.gguf")
    nb.run("%nbinfer alias mine {{ where }}")
    assert nb.run("%nbinfer alias mine") == "some folder/model.gguf"
    with pytest.raises(UsageError, match="there is no variable 'wher'"):
        nb.run("%nbinfer alias mine {{ wher }}")


def test_config_says_where_each_value_comes_from(nb: Notebook) -> None:
    nb.run("%config NbInfer.footer = False")
    rows = {row["setting"]: row for row in nb.run("%nbinfer config").to_dict("records")}
    assert (rows["NbInfer.footer"]["value"], rows["NbInfer.footer"]["source"]) == ("False", "set here")
    assert rows["NbInfer.stream"]["source"] == "default"


def test_doctor_is_the_table_of_python(nb: Notebook) -> None:
    nb.add(FakeEngine(), "a")
    frame = nb.run("%nbinfer doctor")
    assert list(frame["what"]) == list(session.doctor()["what"])
    assert "model a" in list(frame["what"])


def test_doctor_says_what_a_report_needs(nb: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    nb.add(FakeEngine(context_size=4096), "a")
    ram = Ram(total=8 << 30, available=3 << 30, limit="cgroup")
    gpu = Gpu(index=0, name="Card", total=24 << 30, free=20 << 30)
    absent = [("odd", BackendStatus.parse("Not Installed"), "pip install odd")]
    monkeypatch.setattr("nbinfer.backends.statuses", lambda: absent)
    monkeypatch.setattr(
        "nbinfer.memory.machine", lambda: Machine(ram=ram, gpus=(gpu,), gpu_status="one hides")
    )
    monkeypatch.setattr(
        "nbinfer.sidecar.commands.checkup",
        lambda: [{"what": "sidecar", "status": "ok", "detail": "none runs"}],
    )
    rows = {row["what"]: (row["status"], row["detail"]) for row in session.doctor().to_dict("records")}
    assert {"nbinfer", "python", "pandas", "llama-cpp-python"} <= rows.keys()
    assert rows["memory"] == ("ok", "3 GiB free of 8 GiB, limited by cgroup")
    assert rows["gpu 0"] == ("ok", "Card, 20 GiB free of 24 GiB")
    assert rows["gpu"] == ("check", "one hides")
    assert rows["backend odd"] == ("Not Installed", "pip install odd")
    assert rows["model a"] == ("ok", "completion, fake, context 4,096, 4 at once")
    assert rows["sidecar"] == ("ok", "none runs")
    monkeypatch.setattr("nbinfer.memory.machine", lambda: Machine(ram=ram, gpu_status="no NVIDIA driver"))
    rows = {row["what"]: (row["status"], row["detail"]) for row in session.doctor().to_dict("records")}
    assert rows["gpu"] == ("missing", "no NVIDIA driver")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_command_has_help(nb: Notebook, command: Any) -> None:
    nb.run(f"%nbinfer {command.name} --help")
    assert nb.texts[0].startswith(f"%nbinfer {command.name}")
    nb.run(f"%nbinfer help {command.name}")
    assert nb.texts[0].startswith(f"%nbinfer {command.name}")


@pytest.mark.parametrize("line", ["", "--help", "help"])
def test_the_help_lists_all_commands(nb: Notebook, line: str) -> None:
    nb.run(f"%nbinfer {line}")
    assert all(command.name in nb.texts[0] for command in COMMANDS)
    with pytest.raises(UsageError):
        nb.run("%nbinfer help laod")


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("pull x", "nbinfer.session.pull"),
        ("panel", "nbinfer.widgets.panel"),
        ("models", "nbinfer.session.models"),
    ],
)
def test_commands_are_the_python_functions(
    nb: Notebook, monkeypatch: pytest.MonkeyPatch, line: str, target: str
) -> None:
    monkeypatch.setattr(target, lambda *words, **_options: ("called", *words))
    assert nb.run(f"%nbinfer {line}") == ("called", *line.split()[1:])


def test_estimate_is_the_python_function(nb: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbinfer.memory

    monkeypatch.setattr(nbinfer.memory, "estimate", lambda ref, **options: (ref, options), raising=False)
    assert nb.run("%nbinfer estimate a.gguf -c 4096 --kv-type q8_0 -p flash_attention=true") == (
        "a.gguf",
        {"context_size": 4096, "kv_type": "q8_0", "flash_attention": True},
    )


def test_tables_are_data_too(nb: Notebook) -> None:
    nb.add(FakeEngine(), "a")
    nb.run("x = %nbinfer ps")
    assert isinstance(nb["x"], pd.DataFrame)
