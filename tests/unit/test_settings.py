"""Settings outside the notebook: which place wins, where a value came from, and mistakes by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.fake_engine import FakeEngine
from support.notebook import notebook
from traitlets.config import Config

import nbinfer as nb
from nbinfer import session as sessions
from nbinfer.contract import settings as rules
from nbinfer.contract.errors import ConfigError, NbinferError
from nbinfer.contract.settings import SETTINGS, configured, configured_aliases
from nbinfer.display.result import VIEWS
from nbinfer.magics.settings import NbInfer
from nbinfer.models.cache import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project's folder with one below, which is the working directory; a home with nothing in it."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "project" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "notebooks")
    yield tmp_path
    NbinferError.full_tracebacks = False
    nb.settings.model = None


def project(place: Path, text: str) -> Path:
    path = place / "project" / "pyproject.toml"
    path.write_text(text)
    return path


def user(place: Path, text: str) -> Path:
    path = place / "home" / "nbinfer" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def row(settings: NbInfer, name: str) -> tuple[str, str]:
    found = {row["setting"]: row for row in settings.rows()}[name]
    return found["value"], found["source"]


def test_without_anything_it_is_the_default() -> None:
    assert {setting.name: configured(setting.name) for setting in SETTINGS} == {
        setting.name: rules.Configured(setting.default, "default") for setting in SETTINGS
    }
    assert configured_aliases() == {}
    assert rules.sources() == []


def test_the_stronger_place_wins_and_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = user(place, 'model = "of-user"\nfooter = false\n')
    assert configured("model") == rules.Configured("of-user", f"user: {mine}")
    theirs = project(place, '[tool.nbinfer]\nmodel = "of-project"\nstream = false\n')
    assert configured("model") == rules.Configured("of-project", f"project: {theirs}")
    assert configured("footer") == rules.Configured(value=False, source=f"user: {mine}")
    monkeypatch.setenv("NBINFER_MODEL", "of-environment")
    assert configured("model") == rules.Configured("of-environment", "environment: NBINFER_MODEL")
    settings = NbInfer()
    assert (settings.model, settings.footer, settings.stream) == ("of-environment", False, False)
    assert nb.settings.model == "of-environment"
    assert row(settings, "NbInfer.model") == ("'of-environment'", "environment: NBINFER_MODEL")
    assert row(settings, "NbInfer.footer") == ("False", f"user: {mine}")
    assert row(settings, "NbInfer.stream") == ("False", f"project: {theirs}")
    settings.model = "of-cell"
    settings.footer = True
    assert nb.settings.model == "of-cell"
    assert row(settings, "NbInfer.model") == ("'of-cell'", "set here")
    assert row(settings, "NbInfer.footer") == ("True", "set here")


def test_ipythons_own_configuration_is_between_the_environment_and_the_project(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(place, '[tool.nbinfer]\nmodel = "of-project"\nformat = "text"\n')
    config = Config({"NbInfer": {"model": "of-ipython"}})
    settings = NbInfer(config=config)
    assert (settings.model, settings.format) == ("of-ipython", "text")
    assert nb.settings.model == "of-ipython"
    assert row(settings, "NbInfer.model") == ("'of-ipython'", "IPython's configuration")
    nb.settings.model = None
    monkeypatch.setenv("NBINFER_MODEL", "of-environment")
    assert NbInfer(config=config).model == "of-environment"


def test_a_model_set_in_python_before_the_magics_stays() -> None:
    nb.settings.model = "of-python"
    settings = NbInfer()
    assert (settings.model, nb.settings.model) == ("of-python", "of-python")
    assert row(settings, "NbInfer.model") == ("'of-python'", "set here")


def test_the_nearest_project_that_has_settings_counts(place: Path) -> None:
    (place / "pyproject.toml").write_text('[tool.nbinfer]\nmodel = "far"\n')
    project(place, "[project]\nname = 'x'\n")
    assert configured("model").value == "far"
    project(place, "[tool.nbinfer]\n")
    assert configured("model").value is None


def test_a_changed_file_is_read_again(place: Path) -> None:
    path = project(place, '[tool.nbinfer]\nmodel = "one"\n')
    assert configured("model").value == "one"
    path.write_text('[tool.nbinfer]\nmodel = "three"\n')
    assert configured("model").value == "three"


def test_a_call_without_a_model_means_the_configured_one(place: Path) -> None:
    project(place, '[tool.nbinfer]\nmodel = "b"\n[tool.nbinfer.aliases]\nshort = "b"\n')
    with notebook() as opened:
        opened.add(FakeEngine(), "a")
        engine = FakeEngine()
        opened.add(engine, "b")
        nb.infer("hi")
        opened.run("%infer -q hello")
        assert len(engine.requests) == 2
        table = opened.run("%nbinfer config")
        source = table.set_index("setting").loc["NbInfer.model", "source"]
        assert source.startswith("project: ")


def test_aliases_of_a_project_are_its_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "project" / "models").mkdir()
    (place / "project" / "models" / "small.gguf").touch()
    user(place, '[aliases]\nbig = "of-user"\nmine = "hf:owner/repo"\n')
    project(place, '[tool.nbinfer.aliases]\nsmall = "models/small.gguf"\nbig = "hf:owner/big"\n')
    assert configured_aliases() == {
        "small": str(place / "project" / "models" / "small.gguf"),
        "big": "hf:owner/big",
        "mine": "hf:owner/repo",
    }
    fresh = sessions.Session()
    assert fresh.aliases["big"] == "hf:owner/big"
    fresh.aliases["big"] = "other"
    assert fresh.aliases["big"] == "other"


def test_where_files_are_kept_can_be_set_in_a_project(place: Path) -> None:
    project(place, f'[tool.nbinfer]\ncache = "{place.as_posix()}/kept"\njournal_bytes = 1000\n')
    assert cache_dir("x") == place / "kept" / "x"
    assert nb.cache.info().limit == 1000
    assert row(NbInfer(), "journal_bytes")[0] == "1000"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[tool.nbinfer]\nmodle = "x"', ["no setting 'modle'", "Did you mean model?", "pyproject.toml"]),
        ('[tool.nbinfer]\nformat = "fancy"', ["format = 'fancy'", "one of rich, text, code, json, html"]),
        ('[tool.nbinfer]\nfooter = "yes"', ["footer = 'yes'", "true or false"]),
        ("[tool.nbinfer]\nmodel = 3", ["model = 3", "a text"]),
        ("[tool.nbinfer]\njournal_bytes = 0", ["a number of bytes, at least 1"]),
        ("[tool.nbinfer]\njournal_bytes = true", ["a number of bytes"]),
        ("[tool.nbinfer]\naliases = 3", ["aliases is not a table"]),
        ("[tool]\nnbinfer = 3", ["is not a table"]),
        ("[tool.nbinfer\n", ["cannot be read"]),
    ],
)
def test_a_mistake_in_a_file_is_named(place: Path, text: str, parts: list[str]) -> None:
    project(place, text)
    with pytest.raises(ConfigError) as caught:
        configured("model")
    assert [part for part in parts if part not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) <= 5

    (found,) = [r for r in sessions.doctor().to_dict("records") if r["what"] == "settings"]
    assert found["status"] == "error"


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("NBINFER_MODLE", "x", ["NBINFER_MODLE", "Did you mean NBINFER_MODEL?"]),
        ("NBINFER_JOURNAL_BYTE", "3", ["Did you mean NBINFER_JOURNAL_BYTES?"]),
        ("NBINFER_FORMAT", "fancy", ["NBINFER_FORMAT='fancy'", "one of rich"]),
        ("NBINFER_FOOTER", "maybe", ["NBINFER_FOOTER='maybe'", "true or false"]),
        ("NBINFER_JOURNAL_BYTES", "much", ["NBINFER_JOURNAL_BYTES='much'", "a number of bytes"]),
    ],
)
def test_a_mistake_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, parts: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        [configured(setting.name) for setting in SETTINGS]
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "name",
    ["NBINFER_FUZZ_CASES", "NBINFER_RUNTIME_DIR", "NBINFER_TOKEN", "NBINFER_DOCS_EXECUTE", "NBINFER_LOADS"],
)
def test_other_variables_of_ours_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert configured("model").source == "default"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("on", True), ("False", False), ("NO", False)])
def test_switches_in_the_environment(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:
    monkeypatch.setenv("NBINFER_STREAM", text)
    assert configured("stream").value is value


def test_a_broken_file_that_is_not_for_us_is_not_our_business(place: Path) -> None:
    project(place, "this is [ no TOML")
    assert configured("model").source == "default"


def test_the_magics_have_the_settings_of_the_table() -> None:
    traits: dict[str, Any] = NbInfer.class_traits(config=True)
    table = {setting.name: setting for setting in SETTINGS if setting.magics}
    assert {*traits} == {*table}
    for name, trait in traits.items():
        assert trait.default() == table[name].default, name
        assert tuple(getattr(trait, "values", ()) or ()) == table[name].choices, name
    assert table["format"].choices == VIEWS
