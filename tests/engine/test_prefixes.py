"""What prompts share with those before them, on models of every kind of memory: faster, and the same text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.tiny_models import KINDS, WINDOW, write_tiny

from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest
from nbinfer.engines.llamacpp import open_engine
from nbinfer.engines.llamacpp.saved import SavedStates
from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nbinfer.contract.results import Result
    from nbinfer.engines.llamacpp.generate import CompletionEngine

    Open = Callable[..., CompletionEngine]

pytestmark = pytest.mark.engine

ALL = ("demo", *KINDS)
STORY = "A ship went from harbour to harbour and every sailor told a story of the sea. "


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {"demo": demo_path()} | {kind: write_tiny(folder / f"{kind}.gguf", kind) for kind in KINDS}


@pytest.fixture
def open_kind(paths: dict[str, Path]) -> Iterator[Open]:
    opened: list[Any] = []

    def start(kind: str, **options: Any) -> Any:
        options = {"threads": 1, "context_size": 1024, **options}
        engine = open_engine(paths[kind], mode=Mode.COMPLETION, name=kind, **options)
        opened.append(engine)
        return engine

    yield start
    for engine in opened:
        engine.close()


def answer(engine: CompletionEngine, messages: list[dict[str, Any]], **options: Any) -> Result:
    request = CompletionRequest(messages=tuple(messages), **{"max_tokens": 16, **options})
    result: Result = engine.submit(request).result()
    return result


def chat(engine: CompletionEngine, first: str, *more: str) -> list[Result]:
    """A conversation, turn by turn."""
    messages: list[dict[str, Any]] = []
    results = []
    for text in (first, *more):
        messages.append({"role": "user", "content": text})
        results.append(answer(engine, messages))
        messages.append({"role": "assistant", "content": results[-1].text})
    return results


def _sure(result: Result) -> list[float]:
    return [token.logprob for token in result.logprobs or ()]


TURNS = ("What is the capital of France?", "And of Italy?", "Count from 3 to 9.")
LONG_TURNS = (STORY * 12, "And then?", "Who are you?")


@pytest.mark.parametrize("turns", [TURNS, LONG_TURNS], ids=["short", "longer than the window"])
@pytest.mark.parametrize("kind", ALL)
def test_a_chat_goes_on_where_it_was_with_the_text_of_one_that_starts_anew(
    open_kind: Open, kind: str, turns: tuple[str, ...]
) -> None:
    kept = chat(open_kind(kind), *turns)
    anew = chat(open_kind(kind, exact=True), *turns)
    assert [r.text for r in kept] == [r.text for r in anew]
    assert [r.usage.cached_tokens for r in anew] == [0, 0, 0]
    if kind in ("demo", "window"):
        # The template writes what was answered as it was answered, but for the end of the turn.
        before = [r.usage.prompt_tokens for r in kept[:-1]]
        assert [r.usage.cached_tokens for r in kept[1:]] >= before


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_past_is_taken_whole_or_not_at_all(open_kind: Open, kind: str) -> None:
    """The same question again: all of the prompt is known, and only a cache of every token can use it."""
    engine = open_kind(kind)
    question = [{"role": "user", "content": TURNS[0]}]
    first, again = answer(engine, question), answer(engine, question)
    assert first.text == again.text
    expected = first.usage.prompt_tokens - 1 if kind == "window" else 0
    assert again.usage.cached_tokens == expected


@pytest.mark.parametrize("in_store", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_a_prompt_that_continues_another_begins_where_that_ended(
    open_kind: Open, kind: str, in_store: bool
) -> None:
    engine = open_kind(kind, parallel=1, prefix_cache="64MiB" if in_store else None)
    begun = tuple(engine.tokenize(STORY * 3))
    whole = begun + tuple(engine.tokenize("And then the youngest of them said: "))

    def ask(engine: CompletionEngine, tokens: tuple[int, ...], n: int) -> Result:
        result: Result = engine.submit(CompletionRequest(prompt=tokens, max_tokens=n)).result()
        return result

    ask(engine, begun, 1)
    if in_store:
        ask(engine, tuple(reversed(begun)), 1)
    result = ask(engine, whole, 20)
    assert result.usage.cached_tokens == len(begun)
    assert result.text == ask(open_kind(kind, exact=True), whole, 20).text


@pytest.mark.parametrize("kind", ["demo", "window"])
def test_rows_share_a_beginning_longer_than_the_window_and_write_what_they_write_alone(
    open_kind: Open, kind: str
) -> None:
    engine, alone = open_kind(kind, context_size=2048), open_kind(kind, exact=True)
    system = {"role": "system", "content": STORY * 10}
    rows = [[system, {"role": "user", "content": f"What is {n} plus {n}?"}] for n in range(9)]
    requests = [CompletionRequest(messages=tuple(row), max_tokens=12, priority="batch") for row in rows]
    results = [stream.result() for stream in [engine.submit(request) for request in requests]]
    assert results[0].usage.prompt_tokens > WINDOW
    assert [r.text for r in results] == [answer(alone, row, max_tokens=12).text for row in rows]
    assert sum(r.usage.cached_tokens > WINDOW for r in results) == len(rows) - 1


@pytest.mark.parametrize("parallel", [2, 4])
def test_rows_much_longer_than_the_window_write_what_they_write_alone(open_kind: Open, parallel: int) -> None:
    engine = open_kind("window", context_size=2048, parallel=parallel, micro_batch=64)
    alone = open_kind("window", exact=True)
    words = "anchor bridge candle desert ember forest garden harbour island jungle kettle lantern".split()
    rows = [STORY * 4 + f"{word} " * 70 + "And then?" for word in words]
    requests = [
        CompletionRequest(
            messages=({"role": "user", "content": row},), max_tokens=4, priority="batch", logprobs=1
        )
        for row in rows
    ]
    results = [stream.result() for stream in [engine.submit(request) for request in requests]]
    assert results[0].usage.prompt_tokens > 2 * WINDOW
    for row, result in zip(rows, results, strict=True):
        expected = answer(alone, [{"role": "user", "content": row}], max_tokens=4, logprobs=1)
        assert result.text == expected.text
        np.testing.assert_allclose(_sure(result), _sure(expected), atol=0.01)


@pytest.mark.parametrize("kind", ALL)
def test_a_chat_that_had_to_leave_is_put_back(open_kind: Open, kind: str) -> None:
    engine = open_kind(kind, parallel=1, prefix_cache="64MiB")
    one = [{"role": "user", "content": STORY * 4}]
    first = answer(engine, one)
    answer(engine, [{"role": "user", "content": "Count from 3 to 9, and then all the way back to one."}])
    one += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    back = answer(engine, one)
    fresh = answer(open_kind(kind, exact=True), one)
    assert back.text == fresh.text
    if kind in ("demo", "window"):
        assert back.usage.cached_tokens >= first.usage.prompt_tokens


def test_a_chat_goes_on_after_the_model_was_loaded_again(open_kind: Open, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    one = [{"role": "user", "content": STORY * 4}]
    engine = open_kind("demo", prefix_cache_folder=folder)
    first = answer(engine, one)
    engine.close()
    files = list(folder.rglob("*.state"))
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o777 == 0o600
    assert files[0].parent.stat().st_mode & 0o777 == 0o700
    again = answer(open_kind("demo", prefix_cache_folder=folder), one)
    assert again.text == first.text
    assert again.usage.cached_tokens == first.usage.prompt_tokens - 1
    # Other settings have other states.
    other = answer(open_kind("demo", prefix_cache_folder=folder, kv_type="f32"), one)
    assert other.usage.cached_tokens == 0


@pytest.mark.parametrize("harm", ["cut", "changed", "empty"])
def test_a_damaged_state_is_passed_over_and_removed(open_kind: Open, tmp_path: Path, harm: str) -> None:
    one = [{"role": "user", "content": STORY * 4}]
    engine = open_kind("demo", prefix_cache_folder=tmp_path)
    first = answer(engine, one)
    engine.close()
    (file,) = tmp_path.rglob("*.state")
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes({"cut": content[:-50], "changed": content, "empty": bytearray()}[harm])
    again = answer(open_kind("demo", prefix_cache_folder=tmp_path), one)
    assert (again.text, again.usage.cached_tokens) == (first.text, 0)
    assert not file.exists()


def _state(start: int, n: int = 40, size: int = 10_000) -> tuple[np.ndarray, None, np.ndarray]:
    return np.arange(start, start + n, dtype=np.int32), None, np.full(size, start % 256, np.uint8)


@pytest.mark.parametrize("in_folder", [False, True])
def test_the_states_stay_below_their_limit_and_the_oldest_go(tmp_path: Path, in_folder: bool) -> None:
    store = SavedStates(25_000, tmp_path if in_folder else None)
    for start in (0, 1000):
        store.put(*_state(start))
    found = store.longest(np.arange(0, 60, dtype=np.int32), None, more_than=8, whole=True)
    assert found is not None
    assert found[0].tolist() == [0] * 10_000
    store.put(*_state(2000))  # 1000 was used least recently
    assert store.size == 20_000
    assert store.has(np.arange(0, 40, dtype=np.int32), None)
    assert not store.has(np.arange(1000, 1040, dtype=np.int32), None)
    store.put(*_state(3000, size=25_001))
    assert store.size == 20_000
    assert len(list(tmp_path.rglob("*"))) == (3 if in_folder else 0)


def test_a_folder_has_one_limit_for_states_of_all_settings(tmp_path: Path) -> None:
    for identity in "abc":
        store = SavedStates(2000, tmp_path, identity=identity)
        store.put(*_state(0, size=600))
    left = [path.stat().st_size for path in tmp_path.rglob("*.state")]
    assert 0 < sum(left) <= 2000
    assert store.has(np.arange(0, 40, dtype=np.int32), None)


def test_a_state_that_another_continues_is_not_kept_twice() -> None:
    store = SavedStates(100_000)
    store.put(*_state(0))
    store.put(*_state(0, n=50))
    assert store.size == 10_000
    assert store.longest(np.arange(100, dtype=np.int32), None, more_than=45, whole=False) is not None
    assert store.longest(np.arange(100, dtype=np.int32), "other adapter", more_than=8, whole=False) is None


def test_a_full_disk_costs_the_state_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.numpy

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    store = SavedStates(100_000, tmp_path)
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    store.put(*_state(0))
    assert store.size == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
