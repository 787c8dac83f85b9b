"""A JupyterLab per module (see ``support/lab.py``), or a browser alone with a plain page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.lab import Lab, chromium, open_lab

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with open_lab(tmp_path_factory.mktemp("lab")) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = chromium()
    from playwright.sync_api import sync_playwright
    from screenshots import FLAGS

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab of which every error fails the test."""
    page, errors = browser.new_page(viewport={"width": 900, "height": 1300}), []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("blob:", "data:")) else errors.append(r.url))
    yield page
    page.close()
    assert errors == []
