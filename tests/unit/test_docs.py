"""The documentation says what the program does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from docs_tables import PAGES as GENERATED
from docs_tables import tables, written
from rooms_picture import PICTURE, layers, picture

import nbinfer
from nbinfer.contract import errors
from nbinfer.contract.errors import NbinferError

if TYPE_CHECKING:
    from pathlib import Path

DOCS = GENERATED[0].parents[1]
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


@pytest.mark.parametrize("page", GENERATED, ids=lambda path: path.stem)
def test_the_tables_of_options_and_settings_are_those_of_the_program(page: Path) -> None:
    text = page.read_text()
    assert written(text) == text, "run: python tools/docs_tables.py"


def test_every_generated_table_is_on_a_page() -> None:
    pages = "\n".join(path.read_text() for path in GENERATED)
    assert [name for name, table in tables().items() if table not in pages] == []
    assert "--temperature" in pages
    assert "NBINFER_MODEL" in pages


def test_every_error_has_its_place_in_the_troubleshooting() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    names = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, NbinferError) and value is not NbinferError
    ]
    assert [name for name in names if f"`{name}`" not in page] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_call_that_a_page_shows_is_one_that_there_is(path: Path) -> None:
    names = set(re.findall(r"\bnb\.([a-zA-Z_]+)", path.read_text()))
    assert sorted(name for name in names if not hasattr(nbinfer, name)) == []


def test_every_public_function_is_in_the_reference() -> None:
    reference = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    hidden = {"load_ipython_extension", "unload_ipython_extension", "__version__"}
    missing = [n for n in nbinfer.__all__ if n not in hidden and not re.search(rf"\b{n}\b", reference)]
    assert missing == []


def test_the_picture_of_the_rooms_is_that_of_the_import_check() -> None:
    assert PICTURE.read_text() == picture(), "run: python tools/rooms_picture.py"
    page = (DOCS / "architecture.md").read_text()
    assert [room for room in layers() if f"`{room}`" not in page] == []


def test_every_picture_of_a_page_is_there_in_both_themes() -> None:
    pages = [DOCS.parent / "README.md", *PAGES]
    named = {name for page in pages for name in re.findall(r"images/([\w.-]+\.png)", page.read_text())}
    assert {"01-quickstart-light.png", "panel-dark.png"} <= named
    assert [name for name in sorted(named) if not (DOCS / "images" / name).is_file()] == []
    themes = {name: ("light", "dark") if "-light" in name else ("dark", "light") for name in named}
    assert [name for name, (one, other) in themes.items() if name.replace(one, other) not in named] == []
