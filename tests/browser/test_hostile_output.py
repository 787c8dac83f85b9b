"""What a model writes runs nothing, loads nothing and opens nothing in JupyterLab.

Freshly run cells are trusted there, so that nothing but our own rendering stands between a model and the
page: it has the page's rights, and with them the server's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from support.hostile import CORPUS
from support.kernel import WITH_FAKE

from nbinfer.display.code import COPY

if TYPE_CHECKING:
    from pathlib import Path

    from support.lab import Lab, Tab

pytestmark = pytest.mark.browser

SETUP = f"""{WITH_FAKE}
from IPython.display import display
from support.hostile import CORPUS
from nbinfer.contract.results import Delta, Result, TokenLogprob
from nbinfer.tables import table

def script(request):
    text = CORPUS[request.messages[-1]["content"]]
    half = len(text) // 2
    yield Delta(text, reasoning=True)
    # Half an answer is on screen first: what is not closed yet must not come alive either.
    yield text[:half]
    yield text[half:]

engine.script = script
"""

# The other places where words of a model, a hub or a file name are shown, each with all of the corpus.
ELSEWHERE = """
texts = list(CORPUS.values())
display(Result(text="{}", parsed=[{text: text} for text in texts]))
display(Result(text="{}", parsed={text: text for text in texts}))
display(Result(text="{}", parsed={"deep": texts}))
display(Result(text="x", tool_calls=[{"name": text, "arguments": {text: text}} for text in texts]))
display(Result(text="x", logprobs=tuple(TokenLogprob(text, -2.0, ((text[::-1], -1.0),)) for text in texts),
               model=" ".join(texts)).show_logprobs())
display(Result(text="x", model=" ".join(texts), finish_reason="error", error=" ".join(texts)))
display(table("ps", [{"name": text, "status": f"Error: {text}"} for text in texts], ["name", "status"]))
for language in ("", "html", "markdown", "latex"):
    engine.script = [f"````{language}\\n", "\\n".join(texts), "\\n````"]
    get_ipython().run_cell_magic("infer", "-f code", "go")
engine.script = texts
get_ipython().run_cell_magic("infer", "-f json", "go")
get_ipython().run_cell_magic("infer", "-f text", "go")
get_ipython().run_cell_magic("infer", "--dry-run --raw", " ".join(texts))
"""

# Markup as a page: what the other views never let through.
FRAMED = """
for name, text in CORPUS.items():
    if "<" in text:
        get_ipython().run_cell_magic("infer", "-f html", name)
"""

# What there is below our outputs, as the browser understood it; each element is touched, to see what wakes.
INSPECT = """copy => {
  const found = [];
  const tags = new Set(['STYLE','DIV','SPAN','P','H1','H2','H3','H4','H5','H6','PRE','CODE','EM','STRONG','S',
    'A','BUTTON','UL','OL','LI','BLOCKQUOTE','TABLE','THEAD','TBODY','TR','TH','TD','DETAILS','SUMMARY','BR','HR']);
  const roots = document.querySelectorAll('.nbinfer');
  for (const root of roots) for (const element of root.querySelectorAll('*')) {
    const math = element.closest('mjx-container, .MathJax');
    if (!tags.has(element.tagName) && !math) found.push('tag ' + element.tagName);
    for (const {name, value} of element.attributes) {
      if (name === 'onclick' && element.tagName === 'BUTTON' && value === copy) continue;
      if (name.startsWith('on') || ['src', 'srcset', 'srcdoc', 'action', 'formaction'].includes(name))
        found.push(`${element.tagName} ${name}=${value}`);
      if (/href$/.test(name) && !/^(https?:|mailto:)/.test(value)) found.push(`${name}=${value}`);
      if (name === 'style' && /url|import|expression/i.test(value)) found.push(`style=${value}`);
    }
    for (const kind of ['mouseover', 'focus', 'toggle', 'load', 'error', 'start'])
      element.dispatchEvent(new Event(kind, {bubbles: false}));
    if (!element.closest('a[href]')) element.dispatchEvent(new MouseEvent('click'));
  }
  return [roots.length, found];
}"""

PWNED = """() => Object.keys(window).filter(name => name.startsWith('__pwn'))"""


def pwned(tab: Tab) -> list[str]:
    """What a script of a model has left behind, in the page or in a frame of ours."""
    top = tab.page.main_frame
    return [name for frame in (top, *top.child_frames) for name in frame.evaluate(PWNED)]


def settle(tab: Tab) -> None:
    """Give pictures, frames and timers the time to do what they would do."""
    tab.page.wait_for_timeout(700)


def assert_inert(tab: Tab, outputs: int) -> None:
    settle(tab)
    shown, found = tab.page.evaluate(INSPECT, COPY)
    settle(tab)
    assert (shown, found) == (outputs, [])
    assert (pwned(tab), tab.strays, tab.errors) == ([], [], [])


def test_a_script_would_be_seen_if_it_ran(lab: Lab) -> None:
    # Without this, a page that shows nothing at all would pass the tests below.
    alive = """<img src="data:," onerror="window.__pwn=1"><script>window.__pwn2=1</script>
    <div class="nbinfer"><a href="javascript:1" onclick="1">x</a><img src="http://evil.example/x.png"></div>"""
    lab.write("alive.ipynb", f"from IPython.display import HTML, display\ndisplay(HTML('''{alive}'''))")
    with lab.tab("alive.ipynb") as tab:
        tab.run_all()
        settle(tab)
        assert sorted(pwned(tab)) == ["__pwn", "__pwn2"]
        assert set(tab.strays) == {"http://evil.example/x.png"}
        assert tab.errors  # the picture could not be had
        shown, found = tab.page.evaluate(INSPECT, COPY)
        assert shown == 1
        assert {"href=javascript:1", "A onclick=1", "tag IMG", "IMG src=http://evil.example/x.png"} <= {
            *found
        }


def untrusted_copy(path: Path) -> str:
    """Write a copy that this server has never signed, as a notebook from somebody else is."""
    notebook: dict[str, Any] = json.loads(path.read_text())
    notebook["cells"][0]["source"] = "# from somebody else"
    copy = path.with_name("untrusted.ipynb")
    copy.write_text(json.dumps(notebook))
    return copy.name


def test_answers_are_inert_as_they_stream_in_both_themes_and_when_a_saved_notebook_is_opened(
    lab: Lab,
) -> None:
    path = lab.write("hostile.ipynb", SETUP, *(f"%%infer\n{name}" for name in CORPUS))
    with lab.tab("hostile.ipynb") as tab:
        tab.run_all()
        assert_inert(tab, len(CORPUS))
        tab.shot("hostile-light")
        tab.theme("dark")
        assert_inert(tab, len(CORPUS))
        tab.shot("hostile-dark")
        tab.save()
        tab.open()
        assert_inert(tab, len(CORPUS))
    with lab.tab(untrusted_copy(path)) as tab:
        assert_inert(tab, len(CORPUS))


def test_every_other_place_for_a_models_words_is_inert(lab: Lab) -> None:
    lab.write("elsewhere.ipynb", SETUP, ELSEWHERE)
    with lab.tab("elsewhere.ipynb") as tab:
        tab.run_all()
        assert_inert(tab, 13)  # -f text has no HTML
        tab.shot("hostile-elsewhere")


def test_a_page_that_a_model_wrote_stays_in_its_frame(lab: Lab) -> None:
    lab.write("framed.ipynb", SETUP, FRAMED)
    with lab.tab("framed.ipynb") as tab:
        tab.run_all()
        settle(tab)
        pages = sum("<" in text for text in CORPUS.values())
        assert len(tab.page.frames) >= 1 + pages
        assert (pwned(tab), tab.strays) == ([], [])
        assert tab.blocked
        # The only complaints are those of the browser about what it has blocked.
        blocked = ("Blocked ", "Content Security Policy", "Unsafe attempt to load URL")
        assert [error for error in tab.errors if not any(word in error for word in blocked)] == []
