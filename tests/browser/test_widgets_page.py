"""The widgets' page side, in a real browser on a plain page: what is drawn, pressed and said."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from support.axe import violations
from support.fake_engine import HANG, FakeEngine
from support.hostile import CORPUS
from support.lab import SHOTS
from support.page import draw, put, sent
from support.planner import FakePlanner

from nbinfer.session import Model, session
from nbinfer.widgets.controller import Controller
from nbinfer.widgets.ticks import Monitor
from nbinfer.widgets.watched import Pulse

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def planner() -> FakePlanner:
    return FakePlanner()


@pytest.fixture(scope="module")
def parts(planner: FakePlanner) -> Iterator[dict[str, Any]]:
    """A panel with something in every part."""
    model = Model(engine=FakeEngine(lambda _request: ["one ", HANG]), name="qwen3-0.6b", backend="llamacpp")
    session.add(model)
    stream = model.stream("Write a story about a lighthouse keeper")
    controller = Controller(planner, monitor=Monitor(60), pulse=Pulse(None))
    controller.say("demo is loaded; it took 2 s.")
    controller.say("the model's process ended: killed by signal 9.", kind="error", log="line\n" * 40)
    controller.look()
    controller.look_around()
    curve = planner.around("demo", _plan(planner, 65536)["settings"])["curve"]
    of = {"ref": "demo", "kv_type": "f16", "gpu_layers": -1, "parallel": None}
    state = {
        **controller.state.parts(),
        "plan": _plan(planner, 65536),
        "curve": {"of": of, "rows": curve},
    }
    yield state
    stream.cancel()
    controller.close()
    model.unload()


def _plan(planner: FakePlanner, context_size: int, *, seq: int = 0, settling: bool = False) -> dict[str, Any]:
    plan = planner.quick("demo", {"context_size": context_size})
    return {**plan, "ref": "demo", "seq": seq, "settling": settling, "error": ""}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["panel", "bar", "monitor", "badge"])
def test_nothing_is_in_the_way_of_a_screen_reader(
    page: Any, parts: dict[str, Any], kind: str, theme: str
) -> None:
    badge = {"name": "demo", "word": "working", "kind": "busy", "detail": "1 running, 0 waiting"}
    draw(page, kind, {**parts, "badge": badge}, dark=theme == "dark")
    for details in page.locator("details").all():
        details.evaluate("node => { node.open = true; }")
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"widget-{kind}-{theme}.png", full_page=True)
    assert violations(page, "main") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_told_from_its_background(page: Any, parts: dict[str, Any], theme: str) -> None:
    """The rule that needs no axe: contrast of at least 4.5 to 1, as drawn."""
    draw(page, "panel", parts, dark=theme == "dark")
    low = page.evaluate(
        """() => {
          const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
          const rgb = colour => { canvas.clearRect(0, 0, 1, 1);
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data]; };
          const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
          const behind = node => { for (; node; node = node.parentElement) {
            const colour = rgb(getComputedStyle(node).backgroundColor);
            if (colour[3] === 255) return colour; } };
          const found = [];
          const walk = document.createTreeWalker(document.querySelector('.nbinfer-w'), NodeFilter.SHOW_TEXT);
          for (let text = walk.nextNode(); text; text = walk.nextNode()) {
            const node = text.parentElement;
            if (!text.data.trim() || !node.checkVisibility()) continue;
            const pair = [rgb(getComputedStyle(node).color), behind(node)].map(light).sort((a, b) => b - a);
            const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
            if (contrast < 4.5) found.push(`${text.data}: ${contrast.toFixed(2)}`);
          }
          return found; }"""
    )
    assert low == []


def test_everything_is_reached_and_pressed_by_keyboard(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "() => { const a = document.activeElement; return a === document.body ? '' :"
            " a.ariaLabel || a.labels?.[0]?.textContent || a.textContent; }"
        )
        if not name:
            break
        reached.append(name)
    assert reached == [
        "Dismiss this message",
        "The end of its log",
        "Dismiss this message",
        "Unload qwen3-0.6b",
        "Stop: Write a story about a lighthouse keeper",
        "Filter",
        "Look again",
        "Models on this disk",
        *[f"Plan {row['name']}" for row in parts["models"]["rows"] if not row["problem"]],
        "Another",
        "See what it takes",
        "context 16,384",
        "Context",
        "KV cache type",
        "GPU layers",
        "At once",
        "Load although it does not fit",
        "into",
        "and keep it",
        *[
            "How to make it faster" if row["kind"] == "ok" else "How to install"
            for row in parts["backends"]["rows"]
            if row["install"]
        ],
    ]
    page.get_by_role("button", name="Unload qwen3-0.6b").press("Enter")
    page.get_by_role("button", name="Load although it does not fit").press("Space")
    assert [command["name"] for command in sent(page, "unload")] == ["qwen3-0.6b"]
    (load,) = sent(page, "load")
    assert (load["ref"], load["force"], load["settings"]["context_size"]) == ("demo", True, 65536)


def test_the_notebooks_own_keys_stay_out(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    page.evaluate(
        "() => { window.heard = []; document.addEventListener('keydown', e => heard.push(e.key)); }"
    )
    slider = page.get_by_role("slider", name="Context")
    slider.press("ArrowLeft")
    slider.press("d")
    slider.press("d")  # in JupyterLab: delete this cell
    assert page.evaluate("() => heard") == []


def test_the_focus_stays_where_it_is_while_the_state_changes(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    page.get_by_role("button", name="Plan demo-embed").focus()
    rows = parts["models"]["rows"]
    more = [{**rows[0], "ref": "hf:a/b", "name": "a-new-one"}, *rows]
    put(page, models={**parts["models"], "rows": more}, machine=parts["machine"], loaded=parts["loaded"])
    assert page.evaluate("() => document.activeElement.ariaLabel") == "Plan demo-embed"
    assert page.get_by_role("button", name="Plan ").count() == len(more)


def test_sixty_moves_of_a_slider_redraw_at_once_and_ask_once_at_a_time(
    page: Any, parts: dict[str, Any], planner: FakePlanner
) -> None:
    draw(page, "panel", parts)
    slider = page.get_by_role("slider", name="Context")
    bar = page.get_by_role("region", name="Will it fit?").get_by_role("meter")
    texts = bar.evaluate(
        """async bar => {
          const slider = document.querySelector('input[type=range]'), texts = [];
          for (let i = 0; i < 60; i++) {
            slider.value = i % 8;
            slider.dispatchEvent(new Event('input', { bubbles: true }));
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            texts.push(bar.getAttribute('aria-valuetext'));
          }
          return texts; }"""
    )
    expected = [row[0]["text"] for row in parts["curve"]["rows"]]
    # The kernel has not said a word, and every move is on the page by the next frame.
    assert texts == [expected[i % 8] for i in range(60)]
    asked = sent(page, "plan")
    assert len(asked) < 10
    assert "the exact number follows" in page.locator(".nbinfer-w").inner_text()
    late = asked[-1]["settings"]["context_size"]
    put(page, plan={**_plan(planner, late, seq=asked[-1]["seq"]), "settling": True})
    # Where the answer was to an older move, the slider stays and the newest is asked for.
    assert slider.get_attribute("aria-valuetext") == "4,096 tokens"
    newest = sent(page, "plan")
    assert newest[-1]["settings"]["context_size"] == 4096
    assert len(newest) <= len(asked) + 1
    put(page, plan=_plan(planner, 4096, seq=newest[-1]["seq"]))
    assert bar.get_attribute("aria-valuetext") == expected[3]
    assert sent(page, "plan") == newest, "answered: nothing more is asked"


def test_an_advice_is_a_button_that_sets_the_sliders(
    page: Any, parts: dict[str, Any], planner: FakePlanner
) -> None:
    draw(page, "panel", parts)
    assert page.locator(".nbinfer-w-verdict").inner_text() == "does not fit 9.25 GiB of 8 GiB of the GPU"
    page.get_by_role("button", name="context 16,384").click()
    (asked,) = sent(page, "plan")
    assert asked["settings"]["context_size"] == 16384
    put(page, plan=_plan(planner, 16384, seq=asked["seq"]))
    assert page.locator(".nbinfer-w-verdict").inner_text().startswith("fits")
    assert page.get_by_role("button", name="Load", exact=True).is_enabled()
    assert not page.get_by_text("What fits").is_visible()


def test_an_advice_of_the_same_words_sets_its_own_numbers(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    advice = {"label": "context 16k", "settings": {"context_size": 16384}}
    put(page, plan={**parts["plan"], "advice": [advice]})
    put(page, plan={**parts["plan"], "advice": [{**advice, "settings": {"context_size": 16128}}]})
    page.get_by_role("button", name="context 16k").click()
    (asked,) = sent(page, "plan")
    assert asked["settings"]["context_size"] == 16128


def test_a_model_that_could_not_be_unloaded_can_be_asked_again(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    press = page.get_by_role("button", name="Unload qwen3-0.6b")
    press.click()
    assert press.is_disabled()
    failed = {"id": "m9", "kind": "error", "text": "it is in use", "log": ""}
    put(page, messages={"rows": [failed]})
    assert press.is_enabled()


def test_a_model_that_draws_has_no_field_for_what_it_has_not(
    page: Any, parts: dict[str, Any], planner: FakePlanner
) -> None:
    none: dict[str, Any] = {"context": [], "kv_types": [], "layers": 0, "parallel": 0}
    settings = {"context_size": None, "kv_type": "f16", "gpu_layers": -1, "parallel": None}
    verdict = {"word": "unknown", "kind": "off", "text": "at least 4 GiB of 8 GiB"}
    plan = {**_plan(planner, 4096), "limits": none, "settings": settings, "verdict": verdict}
    draw(page, "panel", {**parts, "plan": plan})
    section = page.get_by_role("region", name="Will it fit?")
    assert section.get_by_role("slider").count() == 0
    assert section.get_by_label("KV cache type").is_hidden()
    section.get_by_role("button", name="Load", exact=True).click()
    (load,) = sent(page, "load")
    assert load["settings"] == settings


def test_the_list_is_filtered_by_all_words(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    page.get_by_role("searchbox", name="Filter").fill("LLAMA q8")
    assert page.get_by_role("button", name="Plan ").all_inner_texts() == ["Plan"]
    assert page.get_by_text(f"1 of {len(parts['models']['rows'])} models").is_visible()


def test_a_model_that_is_not_in_the_list_is_planned_by_its_name(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    field = page.get_by_label("Another", exact=True)
    field.press("Enter")
    field.fill("  hf:owner/name:Q4_K_M ")
    field.press("Enter")
    page.get_by_role("button", name="See what it takes").click()
    asked = sent(page, "plan")
    assert [each["ref"] for each in asked] == ["hf:owner/name:Q4_K_M"] * 2
    # A server may take its time; what comes meanwhile is of the model before.
    looking = page.get_by_text("Looking at hf:owner/name:Q4_K_M…")
    assert looking.is_visible()
    put(page, plan={**parts["plan"], "settling": False})
    assert looking.is_visible()
    put(page, plan={**_plan(FakePlanner(), 4096, seq=asked[-1]["seq"]), "ref": "hf:owner/name:Q4_K_M"})
    assert looking.is_hidden()
    page.get_by_role("button", name="Load", exact=True).click()
    assert sent(page, "load")[0]["ref"] == "hf:owner/name:Q4_K_M"


def test_stop_is_off_while_it_could_not_act_and_says_why(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    stop = page.get_by_role("button", name="Stop: ")
    assert stop.is_enabled()
    put(page, kernel={"beat": 2, "ack": 0, "blocked": True, "text": "A cell is running."})
    assert stop.is_disabled()
    assert page.get_by_text("a cell holds the kernel: use ■").is_visible()
    assert page.get_by_text("A cell is running.").is_visible()
    put(page, kernel={"beat": 3, "ack": 0, "blocked": False, "text": ""})
    stop.click()
    assert stop.is_disabled()
    put(page, kernel={"beat": 4, "ack": 0, "blocked": False, "text": ""})
    assert stop.is_disabled(), "a beat of the kernel is no answer to the press"
    assert [command["id"] for command in sent(page, "stop")] == [parts["requests"]["rows"][0]["id"]]


def test_a_press_that_nobody_hears_is_said_and_so_is_a_kernel_that_is_gone(
    page: Any, parts: dict[str, Any]
) -> None:
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    draw(page, "panel", parts)
    page.get_by_role("button", name="Look again").click()
    page.clock.run_for(1000)
    assert page.get_by_text("Waiting for the kernel").is_visible()
    put(page, kernel={"beat": 2, "ack": 1, "blocked": False, "text": ""})
    assert not page.get_by_text("Waiting for the kernel").is_visible()
    page.clock.run_for(7000)
    assert page.get_by_text("Not connected to a kernel: run the cell again.").is_visible()
    put(page, kernel={"beat": 3, "ack": 1, "blocked": False, "text": ""})
    assert not page.get_by_text("Not connected").is_visible()


def test_names_are_text_whatever_they_are(page: Any, parts: dict[str, Any]) -> None:
    for text in CORPUS.values():
        # Every text of every part, but for those that the page compares or uses as keys.
        hostile = json.loads(json.dumps(parts))
        row = hostile["models"]["rows"][0]
        row |= {"name": text, "about": text, "source": text, "size": text, "verdict": text, "kind": text}
        hostile["messages"]["rows"][0] |= {"text": text, "log": text, "kind": text}
        hostile["requests"]["rows"][0] |= {"what": text, "model": text}
        hostile["loaded"]["rows"][0] |= {"name": text, "queue": text, "context": text, "memory": text}
        hostile["backends"]["rows"][0] |= {
            "name": text,
            "word": text,
            "detail": text,
            "install": text,
            "more": text,
        }
        hostile["plan"] |= {"name": text, "source": text, "advice": [{"label": text, "settings": {}}]}
        hostile["machine"]["rows"][0] |= {"name": text, "text": text}
        draw(page, "panel", hostile)
        strange = page.evaluate(
            "() => document.querySelectorAll('.nbinfer-w :is(script, img, svg, iframe, a, style, math, form,"
            " object, embed, video, audio, link, base)').length"
        )
        assert strange == 0, text


def test_a_closed_view_leaves_nothing_behind(page: Any, parts: dict[str, Any]) -> None:
    draw(page, "panel", parts)
    assert len(sent(page, "open")) == 1
    page.evaluate("() => window.close_widget()")
    assert len(sent(page, "close")) == 1
    assert page.evaluate("() => window.model.listening()") == 0
