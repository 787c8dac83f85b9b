"""Growing answers: the first token at once, few updates, everything in the end."""

from __future__ import annotations

import io
import os
import signal
from itertools import pairwise
from typing import Any

import pytest
from support.hostile import problems

from nbinfer.contract.results import Delta, Finished, PromptProgress, Result, Usage
from nbinfer.display.sinks import UPDATES_PER_SECOND, JupyterSink, NullSink, ShownResult, TerminalSink, follow
from nbinfer.display.style import STYLE

DONE = Result(text="one two", usage=Usage(completion_tokens=2), model="demo")


class Screen:
    """Takes what a sink publishes, under a clock that only the test and the sink's sleeps move."""

    def __init__(self) -> None:
        self.now = 100.0
        self.shown: list[tuple[float, dict[str, Any], bool]] = []
        self.render_seconds = 0.0

    def publish(self, data: dict[str, Any], metadata: dict[str, Any], update: bool) -> None:
        self.shown.append((self.now, data, update))
        self.now += self.render_seconds

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def sink(self, **options: Any) -> JupyterSink:
        return JupyterSink(
            model="demo", publish=self.publish, clock=lambda: self.now, sleep=self.sleep, **options
        )

    @property
    def texts(self) -> list[str]:
        return [data["text/plain"] for _, data, _ in self.shown]


def test_the_first_token_is_shown_at_once_and_the_end_exactly_once() -> None:
    screen = Screen()
    sink = screen.sink()
    sink.event(Delta("one"))
    assert (screen.texts, screen.now) == (["one"], 100.0)
    sink.event(Delta(" two"))
    sink.finish(DONE)
    assert screen.texts == ["one", "one two", "one two"]
    assert [update for _, _, update in screen.shown] == [False, True, True]
    assert "stop" in screen.shown[-1][1]["text/html"]
    assert "stop" not in screen.shown[-2][1]["text/html"]


def test_updates_are_at_most_twelve_a_second() -> None:
    screen = Screen()
    sink = screen.sink()
    for _ in range(200):
        sink.event(Delta("x"))
        screen.now += 0.001
    times = [at for at, _, _ in screen.shown]
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= 1 / UPDATES_PER_SECOND - 1e-9


def test_no_token_waits_for_the_next_one_to_be_seen() -> None:
    screen = Screen()
    sink = screen.sink()
    sink.event(Delta("quick"))
    sink.event(Delta(" token"))  # then the model stalls
    assert screen.texts[-1] == "quick token"


def test_an_answer_that_is_slow_to_render_is_updated_less_often() -> None:
    screen = Screen()
    screen.render_seconds = 0.5
    sink = screen.sink()
    for _ in range(3):
        sink.event(Delta("x"))
    times = [at for at, _, _ in screen.shown]
    assert times == pytest.approx([100.0, 102.0, 104.0])


def test_an_interrupt_while_an_output_is_sent_leaves_one_output() -> None:
    screen = Screen()

    def publish(data: dict[str, Any], metadata: dict[str, Any], update: bool) -> None:
        screen.publish(data, metadata, update)
        if len(screen.shown) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    sink = JupyterSink(publish=publish)
    with pytest.raises(KeyboardInterrupt):
        sink.event(Delta("one"))
    sink.finish(DONE)
    assert [update for _, _, update in screen.shown] == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_output_at_the_end_when_not_live() -> None:
    screen = Screen()
    sink = screen.sink(live=False)
    sink.event(PromptProgress(1, 9))
    sink.event(Delta("one two"))
    sink.finish(DONE)
    assert (screen.texts, screen.shown[0][2]) == (["one two"], False)


def test_reading_a_long_prompt_is_shown_and_then_replaced() -> None:
    screen = Screen()
    sink = screen.sink()
    sink.event(PromptProgress(512, 2048))
    sink.event(PromptProgress(513, 2048))
    sink.event(PromptProgress(2048, 2048))
    sink.event(Delta("one"))
    assert screen.texts == ["reading the prompt: 512 of 2048 tokens", "one"]
    assert problems(screen.shown[0][1]["text/html"], style=STYLE) == []


def test_reasoning_is_shown_apart_while_it_grows() -> None:
    screen = Screen()
    sink = screen.sink()
    sink.event(Delta("hmm", reasoning=True))
    sink.event(Delta("yes"))
    assert "<details open>" in screen.shown[0][1]["text/html"]
    assert screen.texts == ["", "yes"]


def test_other_answers_to_the_same_prompt_are_not_mixed_in() -> None:
    screen = Screen()
    sink = screen.sink()
    sink.event(Delta("one"))
    sink.event(Delta("other", index=1))
    assert screen.texts == ["one"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_terminal(
    *events: Any, result: Result = DONE, err: io.StringIO | None = None, **options: Any
) -> tuple[str, str]:
    out, err = io.StringIO(), err or io.StringIO()
    sink = TerminalSink(out=out, err=err, **options)
    follow([*events, Finished(result)], sink)
    sink.finish(result)
    return out.getvalue(), err.getvalue()


def test_a_terminal_gets_each_token_once_and_a_line_end() -> None:
    assert run_terminal(PromptProgress(1, 2), Delta("one "), Delta("two")) == ("one two\n", "")
    assert run_terminal(Delta("line\n")) == ("line\n", "")


def test_a_terminal_is_told_how_it_ended() -> None:
    out, err = run_terminal(Delta("par"), result=DONE.with_changes(finish_reason="interrupted"))
    assert (out, err) == ("par\n", "[interrupted: the answer is not complete]\n")


def test_reasoning_goes_to_standard_error_dimmed_where_it_can_be() -> None:
    events = (Delta("hm", reasoning=True), Delta("yes"))
    assert run_terminal(*events) == ("yes\n", "hm\n\n")
    assert run_terminal(*events, err=Terminal()) == ("yes\n", "\x1b[2mhm\x1b[0m\x1b[2m\n\n\x1b[0m")


def test_a_terminal_obeys_no_escape_sequence_of_the_model() -> None:
    out, err = run_terminal(Delta("\x1b]0;owned\x07", reasoning=True), Delta("\x1b[2Ja\rb\r"), Delta("\nc"))
    assert out == "\u241b[2Jab\nc\n"
    assert "\x1b" not in err


def test_the_code_view_of_a_terminal_is_the_block_alone() -> None:
    result = DONE.with_changes(text="Here:\n```py\nx = 1\n```\n")
    assert run_terminal(Delta(result.text), result=result, view="code") == ("x = 1\n", "")


def test_a_terminal_that_is_not_live_prints_at_the_end() -> None:
    assert run_terminal(Delta("one"), live=False) == ("one two\n", "")


def test_nothing_is_shown_by_the_null_sink(capsys: pytest.CaptureFixture[str]) -> None:
    sink = NullSink()
    follow([Delta("x"), Finished(DONE)], sink)
    sink.finish(DONE)
    assert capsys.readouterr() == ("", "")


def test_a_shown_result_is_the_result_and_shows_once() -> None:
    shown = ShownResult.of(DONE, view="text")
    assert isinstance(shown, Result)
    assert shown.to_dict() == DONE.to_dict()
    shown._ipython_display_()  # already on screen
    with pytest.raises(NotImplementedError):  # IPython's "use the other formatters"
        shown._ipython_display_()
    assert shown._repr_mimebundle_()[0] == {"text/plain": "one two"}


def test_a_shown_result_shows_itself_after_its_cell() -> None:
    shown = ShownResult.of(DONE)
    shown.settle()
    with pytest.raises(NotImplementedError):
        shown._ipython_display_()


def test_a_changed_copy_of_a_shown_result_shows_itself() -> None:
    copy: Any = ShownResult.of(DONE, view="text").with_changes(text="other")
    with pytest.raises(NotImplementedError):
        copy._ipython_display_()
    assert "other" in copy._repr_mimebundle_()[0]["text/html"]
