"""What pieces of a server's answer become, and what is left of them when the server was lost."""

from __future__ import annotations

from typing import Any

from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, ScoreRequest
from nbinfer.engines.protocol import EngineInfo
from nbinfer.engines.remote.answers import Job

INFO = EngineInfo(backend="openai", model="m", mode=Mode.COMPLETION, context_size=100)
CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"delta": {"reasoning_content": "hm"}}]},
    {"choices": [{"delta": {"content": "Hel"}}]},
    {"choices": [{"delta": {"content": "lo"}, "finish_reason": "stop"}], "timings": {"prompt_ms": 3.0}},
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
]


def job(*chunks: dict[str, Any]) -> tuple[Job, CompletionRequest]:
    request = CompletionRequest(messages=({"role": "user", "content": "Hi"},))
    made = Job(request, 0.0)
    for chunk in chunks:
        made.take(chunk)
    return made, request


def test_pieces_become_a_result_and_the_servers_own_times_are_kept() -> None:
    made, request = job(*CHUNKS)
    result = made.result(request, model="m", own=False)
    assert (result.text, result.reasoning, result.finish_reason) == ("Hello", "hm", "stop")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (7, 3)
    assert made.measured == {"prompt_ms": 3.0}


def test_a_cancelled_completion_keeps_what_there_is() -> None:
    result: Any = job(*CHUNKS[:2])[0].interrupted(INFO)
    assert (result.text, result.reasoning, result.finish_reason) == ("Hel", "hm", "interrupted")
    assert (result.usage.completion_tokens, result.model) == (2, "m")


def test_half_of_a_scoring_is_worth_nothing() -> None:
    assert Job(ScoreRequest(prompt="a", answers=("b", "c")), 0.0).interrupted(INFO) is None


def test_beginning_again_forgets_what_a_lost_server_said() -> None:
    made, request = job(*CHUNKS)
    made.restart()
    assert made.measured is None
    assert (made.text, made.reasoning, made.tokens, made.finish, made.usage) == ("", "", 0, None, None)
    assert made.result(request, model="m", own=False).text == ""
