"""Tab knows the options, the models, the files and the notebook's names, and keeps out of prose."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from IPython.core.completer import provisionalcompleter
from support.fake_engine import FakeEngine
from support.notebook import Notebook, notebook

from nbinfer.magics.completion import complete as offers
from nbinfer.magics.options import COMMANDS, INFER
from nbinfer.models.demo import DEMO_MODELS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def nb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    (tmp_path / "grammars").mkdir()
    (tmp_path / "grammars" / "list.gbnf").touch()
    (tmp_path / "guide.lark").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)
    with notebook() as opened:
        opened.add(FakeEngine(), "qwen3-0.6b")
        opened.add(FakeEngine(), "smol")
        opened.run("%nbinfer alias qshort some/file.gguf")
        opened.set(os=os, name="Ada", names=["x"], table=pd.DataFrame({"title": ["x"]}), Person=dict)
        yield opened


def complete(nb: Notebook, cell: str) -> list[str]:
    """Return what Tab offers at the end of ``cell``, as the whole last word would read."""
    with provisionalcompleter():
        found = list(nb.shell.Completer.completions(cell, len(cell)))
    return [
        cell[max(cell.rfind(" ", 0, c.start), cell.rfind("{", 0, c.start)) + 1 : c.start] + c.text
        for c in found
    ]


@pytest.mark.parametrize("start", ["%infer ", "%%infer ", "x = %infer "])
def test_options(nb: Notebook, start: str) -> None:
    assert complete(nb, f"{start}--tem") == ["--temperature"]
    assert complete(nb, f"{start}-t 0 --max") == ["--max-tokens"]
    everything = {flag for option in INFER for flag in option.flags}
    assert set(complete(nb, f"{start}-")) == everything


@pytest.mark.parametrize(
    ("cell", "offered"),
    [
        ("%%infer qw", ["qwen3-0.6b"]),
        ("%%infer q", ["qshort", "qwen3-0.6b"]),
        ("%infer -m sm", ["smol"]),
        ("%infer --model=sm", ["--model=smol"]),
        ("%infer -f j", ["json"]),
        ("%infer --schema Per", ["Person"]),
        ("%infer --over tab", ["table"]),
        ("%infer --grammar g", ["grammars/", "guide.lark"]),
        ("%infer --grammar grammars/", ["grammars/list.gbnf"]),
        ("%infer --grammar .h", [".hidden"]),
        ("%%infer\nabout {{ nam", ["name", "names"]),
        ("%%infer\nabout {{ name }} and {{na", ["name", "names"]),
        ("%infer about {{ Per", ["Person"]),
        ("%infer -s {{ Per", ["Person"]),
        ("%%infer\n{{ table.tit", ["table.title"]),
        ("%%infer\n{{ name | upp", ["upper"]),
        ("%%infer\n{{ len(nam", ["name", "names"]),
        ("%nbinfer load {{ nam", ["name", "names"]),
        ("%nbinfer un", ["unload"]),
        ("%nbinfer unload sm", ["smol"]),
        ("%nbinfer load --mode emb", ["embedding"]),
        ("%nbinfer load dem", sorted(DEMO_MODELS)),
        ("%nbinfer load gui", ["guide.lark"]),
        ("%nbinfer load demo --par", ["--parallel", "--param"]),
        ("%nbinfer help est", ["estimate"]),
    ],
)
def test_values(nb: Notebook, cell: str, offered: list[str]) -> None:
    # Inside brackets and after = the word that Tab replaces is shorter than what stands between spaces.
    assert [text.rpartition("(")[2] for text in complete(nb, cell)] == offered


def test_commands(nb: Notebook) -> None:
    assert {command.name for command in COMMANDS} <= set(complete(nb, "%nbinfer "))


def test_items_carry_their_type(nb: Notebook) -> None:
    with provisionalcompleter():
        (model,) = nb.shell.Completer.completions("%%infer qw", 10)
        (option,) = nb.shell.Completer.completions("%infer --tem", 12)
    assert (model.type, option.type) == ("model", "param")


@pytest.mark.parametrize("cell", ["%%infer\nsome --te", "%%infer\n{{ name }} --te", "na", "x = 1\nna"])
def test_prose_and_python_are_left_alone(nb: Notebook, cell: str) -> None:
    assert "--temperature" not in complete(nb, cell)
    assert offers(cell, nb.shell._nbinfer_extension[0]) is None


def test_what_an_expression_may_not_use_is_not_offered(nb: Notebook) -> None:
    magics = nb.shell._nbinfer_extension[0]
    assert offers("%%infer\n{{ os.pat", magics) is None
    found = offers("%%infer\n{{ get_ip", magics)
    assert found is not None
    assert found.items == ()


def test_nothing_of_the_value_runs_while_completing(nb: Notebook) -> None:
    class Loud:
        calls = 0

        @property
        def inner(self) -> Loud:
            Loud.calls += 1
            return self

    nb.set(loud=Loud())
    assert complete(nb, "%%infer\n{{ loud.inn") == ["loud.inner"]
    # IPython's own matchers may look further; ours does not.
    assert offers("%%infer\n{{ loud.inner.inn", nb.shell._nbinfer_extension[0]) is None
    assert Loud.calls == 0
