"""What an answer looks like, and that all of it can be read, copied and heard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from support import axe
from support.kernel import WITH_FAKE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.lab import Lab, Tab

pytestmark = pytest.mark.browser

CODE = 'import numpy as np\n\ndef f(x: int) -> str:\n    return f"{x!r} <b>"  # a remark\n'
ANSWER = f"# A heading\n\nText, `code`, $e^x$.\n\n|a|b|\n|-|-|\n|1|2|\n\n```python\n{CODE}```\n\n- one\n"
CELLS = (
    f"""{WITH_FAKE}
from dataclasses import dataclass
from math import log
import nbinfer as nb
from nbinfer.contract.results import Delta, Result, TokenLogprob
engine.script = [Delta("Let me think.", reasoning=True), {ANSWER!r}]""",
    "%infer go",
    "Result(text='{}', parsed=[{'country': 'Japan', 'capital': 'Tokyo'}], model='fake')",
    """shades = [('Once', .95), (' upon', .8), (' a', .5), (' time', .2), ('.', .01)]
Result(text="", logprobs=tuple(
    TokenLogprob(t, log(p), ((t, log(p)), (' else', log(.005)))) for t, p in shades
)).show_logprobs()""",
    "Result(text='so far', finish_reason='interrupted', model='fake')",
    "%infer --dry-run What is this?",
    "nb.status()",
    "nb.plot_sweep(nb.estimate('demo', gpus=['1GiB'], exact=False), context_size=[256, 512])",
)


@pytest.fixture(scope="module")
def tab(lab: Lab) -> Iterator[Tab]:
    lab.write("results.ipynb", *CELLS)
    with lab.tab("results.ipynb", height=2600) as opened:
        opened.run_all()
        yield opened


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_answers_can_be_read_in_both_themes_and_heard(tab: Tab, theme: str) -> None:
    tab.theme(theme)
    tab.shot(f"results-{theme}")
    assert axe.violations(tab.page, ".nbinfer", but=".nbinfer mjx-container") == []
    assert (tab.strays, tab.errors) == ([], [])


def test_code_is_copied_to_the_character(tab: Tab) -> None:
    button = tab.page.get_by_role("button", name="Copy").first
    button.click()
    assert tab.page.evaluate("() => getSelection().toString()") == CODE.rstrip()
    tab.page.context.grant_permissions(["clipboard-read"])
    assert tab.page.evaluate("() => navigator.clipboard.readText()") == CODE.rstrip()


def test_reasoning_is_folded_and_opens(tab: Tab) -> None:
    thought = tab.page.get_by_text("Let me think.", exact=True)
    assert not thought.is_visible()
    tab.page.get_by_text("Reasoning (3 words)").click()
    assert thought.is_visible()


def test_a_token_says_on_hover_what_else_it_could_have_been(tab: Tab) -> None:
    token = tab.page.locator(".nbinfer span[title]", has_text="time")
    assert token.get_attribute("title") == "' time' 20 %\n' else' 0.5 %"
    tab.page.get_by_text("As a table").click()
    assert tab.page.get_by_role("row", name="' time'").is_visible()


def test_a_picture_has_its_numbers_below(tab: Tab) -> None:
    picture = tab.page.locator(".jp-RenderedImage img")
    assert picture.count() == 1
    numbers = tab.page.get_by_role("cell", name="1 GiB").first
    assert not numbers.is_visible()
    tab.page.get_by_text("Memory of demo by context_size, against what is free.").click()
    assert numbers.is_visible()
    assert picture.evaluate("image => image.naturalWidth / image.width") == pytest.approx(2, abs=0.02)


def test_an_untrusted_notebook_keeps_the_shades_and_has_no_dead_button(lab: Lab, tab: Tab) -> None:
    tab.save()
    notebook: dict[str, Any] = json.loads((lab.folder / "results.ipynb").read_text())
    notebook["cells"][0]["source"] = "# from somebody else"
    (lab.folder / "untrusted.ipynb").write_text(json.dumps(notebook))
    with lab.tab("untrusted.ipynb", height=2600) as other:
        token = other.page.locator("span[title]", has_text="time")
        assert "232, 89, 12" in token.evaluate("node => getComputedStyle(node).backgroundColor")
        assert other.page.get_by_text("import numpy as np").first.is_visible()
        assert not any(button.is_visible() for button in other.page.locator(".nbinfer-copy").all())
        other.shot("results-untrusted")
        assert other.errors == []
