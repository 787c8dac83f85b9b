"""Our outputs where no notebook's theme is: a white page, and a dark one such as GitHub's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from support.axe import violations
from support.fake_engine import FakeEngine
from support.lab import SHOTS

from nbinfer import estimate
from nbinfer.contract.results import Result
from nbinfer.display import mimebundle
from nbinfer.frames.progress import JupyterSink, Progress
from nbinfer.session import Model, ps, session

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.browser

_PAGE = """<!doctype html><html lang="en"><head><title>outputs</title></head>
<body style="background:{back};color:{text};font:14px sans-serif;margin:16px;width:820px">
<main><h1>Outputs</h1>{outputs}</main></body></html>"""
_MARKDOWN = (
    "Some **text** with `code`, a [link](https://example.org/).\n\n```python\nx = {'a': 1}  # note\n```"
)


@pytest.fixture(scope="module")
def outputs() -> Iterator[str]:
    """One of each, as HTML."""
    engine = FakeEngine()
    model = Model(engine=engine, name="qwen3-0.6b", backend="llamacpp", estimated=lambda: estimate("demo"))
    session.add(model)
    run = Progress("complete", 40)
    for _ in range(30):
        run.add(1)
    shown = [
        estimate("demo", exact=False),
        estimate("demo", exact=False, ram="12MiB", gpus=[]),
        Result(text=_MARKDOWN, reasoning="Let me see.", model="demo", finish_reason="length"),
        Result(text="{}", parsed=[{"city": "Paris", "rooms": 3}, {"city": "Rome", "rooms": None}]),
        ps(),
        model,
    ]
    pages = [
        mimebundle(value)[0]["text/html"] if not hasattr(value, "sweep") else _html(value) for value in shown
    ]
    yield "<hr>".join([*pages, JupyterSink.html(run)])
    model.unload()


def _html(value: Any) -> str:
    html: str = value._repr_mimebundle_()["text/html"]
    return html


@pytest.mark.parametrize(
    ("name", "back", "text"), [("light", "#fff", "#1f2328"), ("dark", "#0d1117", "#f0f6fc")]
)
def test_every_output_can_be_read_without_a_notebooks_theme(
    page: Any, outputs: str, name: str, back: str, text: str
) -> None:
    page.set_content(_PAGE.format(back=back, text=text, outputs=outputs))
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"outputs-plain-{name}.png", full_page=True)
    # Links have the colour of the page. Those of code are one set for both backgrounds, less than 4.5 to 1.
    assert violations(page, "main", but="a, pre span") == []
    painted = page.evaluate(
        "() => [...document.querySelectorAll('.nbinfer, .nbinfer-est')]"
        ".map(node => getComputedStyle(node).backgroundColor)"
    )
    assert set(painted) == {"rgba(0, 0, 0, 0)"}
