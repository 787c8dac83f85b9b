"""The documentation says what the program does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from docs_tables import PAGE, written

import nbinfer
from nbinfer.contract import errors
from nbinfer.contract.errors import NbinferError

if TYPE_CHECKING:
    from pathlib import Path

DOCS = PAGE.parents[1]
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def test_the_tables_of_options_are_those_of_the_parser() -> None:
    page = PAGE.read_text()
    assert "--temperature" in page
    assert written(page) == page, "run: python tools/docs_tables.py"


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
