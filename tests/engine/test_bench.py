"""``nb.bench`` measures what it says, on the demo model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nbinfer.bench import COLUMNS, bench
from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.session import load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.session import Model

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load("demo", threads=1, name="benched") as model:
        yield model


def test_a_row_per_run_with_the_lengths_asked_for(model: Model) -> None:
    frame = bench(model, prompt_tokens=40, new_tokens=6, parallel=(1, 3), runs=2)
    assert list(frame.columns) == list(COLUMNS)
    assert list(zip(frame["parallel"], frame["run"], strict=True)) == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert (frame["new_tokens"] == 6).all()
    # Words are added while they fit: the last may be one of several tokens.
    assert frame["prompt_tokens"].between(35, 40).all()
    assert (frame[["first_token_seconds", "prompt_tokens_per_second", "cpu_seconds"]] > 0).all(axis=None)
    assert (frame["peak_memory_bytes"] > 2**20).all()
    assert frame["load_seconds"].nunique() == 1
    ordered = frame[["token_p50_seconds", "token_p95_seconds", "token_p99_seconds"]]
    assert (ordered.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert frame.attrs["model"] == "benched"


def test_no_prompt_is_answered_from_the_cache(model: Model) -> None:
    before = model.engine.load().prompt_tokens
    frame = bench(model, prompt_tokens=40, new_tokens=2, runs=3)
    computed = model.engine.load().prompt_tokens - before
    # One warm-up beside the three runs; two different prompts may begin with the same token or two.
    assert computed >= 4 * (int(frame["prompt_tokens"].min()) - 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0: it must be at least 1"),
        ({"new_tokens": 1}, "new_tokens=1: it must be at least 2"),
        ({"runs": 0}, "runs=0: it must be at least 1"),
        ({"parallel": 0}, "parallel=0: it must be at least 1"),
        ({"parallel": ()}, "parallel=0: it must be at least 1"),
        ({"prompt_tokens": 100_000}, "Load it with context_size="),
    ],
)
def test_what_cannot_be_measured_is_refused(model: Model, options: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        bench(model, **options)


def test_a_model_that_writes_no_text_is_refused() -> None:
    with load("demo-embed", threads=1) as embedder, pytest.raises(NotSupported, match="embedding"):
        bench(embedder)
