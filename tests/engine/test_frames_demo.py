"""Frames on the real engines: what batching, prefixes and kills must not change."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from support.demo_engine import open_demo

from nbinfer.contract.modes import Mode
from nbinfer.frames import cache, classify, complete, embed, extract, similar, vectors
from nbinfer.frames import filter as keep_rows
from nbinfer.models.demo import demo_embed_path, demo_path
from nbinfer.session import Model

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

COUNTRIES = ["France", "Spain", "Italy", "Japan", "Germany", "Egypt", "Peru", "Norway"]
# Questions the model is sure about: where it is not, a batch of another shape may flip a near tie.
ROWS = [f"What is the capital of {c}?" for c in COUNTRIES]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from nbinfer.frames.journal import close_all

    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    close_all()


def demo(**options: Any) -> Model:
    return Model(open_demo(**options), "demo", backend="llamacpp", paths=(demo_path(),))


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    loaded = demo()
    yield loaded
    loaded.engine.close()


@pytest.fixture(scope="module")
def embedder() -> Iterator[Model]:
    from nbinfer.engines.llamacpp import open_engine

    engine = open_engine(demo_embed_path(), mode=Mode.EMBEDDING, name="demo-embed", threads=1)
    yield Model(engine, "demo-embed", backend="llamacpp", mode=Mode.EMBEDDING, paths=(demo_embed_path(),))
    engine.close()


def test_rows_get_real_answers_beside_their_data(model: Model) -> None:
    frame = pd.DataFrame({"c": ["France", None, "Japan"]}, index=["x", "x", "y"])
    out = complete(frame, "What is the capital of {c}?", model=model, max_tokens=20)
    assert list(out["completion"].fillna("-")) == [
        "The capital of France is Paris.",
        "-",
        "The capital of Japan is Tokyo.",
    ]
    assert list(out["finish_reason"]) == ["stop", "skipped", "stop"]
    assert (out["prompt_tokens"].dropna() > 5).all()
    assert (out["seconds"].dropna() > 0).all()


@pytest.mark.parametrize(
    "rule",
    [
        {
            "schema": {
                "type": "object",
                "properties": {"a": {"type": "string", "minLength": 90}},
                "required": ["a"],
            }
        },
        {"regex": "[A-Za-z ]{90,}!"},
        {
            "choices": [
                "a very long answer that no three tokens hold",
                "another very long answer, still longer",
            ]
        },
    ],
    ids=lambda rule: next(iter(rule)),
)
def test_a_constrained_answer_that_is_cut_is_an_error_with_its_counts(
    model: Model, rule: dict[str, Any]
) -> None:
    for source in ("run", "cache"):
        out = complete(["Say something."], model=model, max_tokens=3, progress=False, **rule).iloc[0]
        assert out["error"].startswith("Truncated: the answer reached max_tokens=3")
        assert (out["finish_reason"], out["completion_tokens"], out["source"]) == ("length", 3, source)
        assert pd.isna(out["completion"])
        assert out["prompt_tokens"] > 3


@pytest.mark.parametrize("options", [{"parallel": 1}, {"parallel": 16}, {"exact": True}])
def test_slots_and_shared_prefixes_do_not_change_greedy_text(model: Model, options: dict[str, Any]) -> None:
    expected = [model.infer(row, max_tokens=16).text for row in ROWS]
    other = demo(**options)
    try:
        assert list(complete(ROWS, model=other, max_tokens=16, cache=False)["completion"]) == expected
    finally:
        other.engine.close()


def test_rows_share_the_beginning_of_their_template(model: Model) -> None:
    instruction = "Say in one word what the capital is. Answer with the name of the city and nothing else. "
    frame = pd.DataFrame({"c": COUNTRIES})
    out = complete(frame, instruction + "Country: {c}", model=model, max_tokens=4, cache=False)
    # All but the first find the instruction's tokens in the context.
    assert (out["cached_tokens"] >= 20).sum() >= len(COUNTRIES) - 1


def test_an_over_long_row_in_the_middle_is_one_error(model: Model) -> None:
    out = complete(
        ["What is 1 plus 4?", "word " * 3000, "What is 2 plus 5?"], model=model, max_tokens=12, progress=False
    )
    assert list(out["error"].isna()) == [True, False, True]
    assert out["error"][1].startswith("ContextOverflow")
    assert out["prompt_tokens"][1] > model.info.context_size


def test_extraction_is_typed_whatever_a_tiny_model_writes(model: Model) -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 9},
            "size": {"enum": ["small", "large"]},
        },
        "required": ["n", "size"],
    }
    out = extract(["What is 1 plus 4?", "What is 2 plus 5?"], schema, "{text}", model=model, max_tokens=60)
    assert out["error"].isna().all(), out["error"].tolist()
    assert str(out["n"].dtype) == "Int64"
    assert out["n"].between(0, 9).all()
    assert set(out["size"]) <= {"small", "large"}


def test_labels_come_with_the_models_own_probabilities(model: Model) -> None:
    frame = pd.DataFrame({"c": ["Italy", None, "Italy"]})
    labels = ["The capital of Italy is Rome.", "The capital of Italy is Oslo."]
    out = classify(frame, labels, "What is the capital of {c}?", probs=True, model=model)
    assert [x if isinstance(x, str) else None for x in out["label"]] == [labels[0], None, labels[0]]
    assert out["confidence"][0] > 0.9
    assert out[[f"p_{label}" for label in labels]].iloc[0].sum() == pytest.approx(1, abs=1e-5)
    generated = classify(frame, labels, "What is the capital of {c}?", method="generate", model=model)
    assert generated["label"][0] == labels[0]
    kept = keep_rows(frame, "Is {c} a country?", threshold=0.0, model=model)
    assert len(kept) == 2
    assert kept["p"].between(0, 1).all()


def test_texts_packed_together_have_the_vectors_they_have_alone(embedder: Model) -> None:
    texts = [f"{'word ' * (i % 12)}text number {i}" for i in range(80)]
    together = vectors(embed(texts, model=embedder)["embedding"])
    alone = np.vstack([embedder.embed(text) for text in texts])
    assert together.shape == (80, 384)
    assert ((together * alone).sum(axis=1) > 0.999).all()


def test_the_nearest_text_is_the_right_one(embedder: Model) -> None:
    corpus = embed(
        pd.DataFrame(
            {"t": ["The parcel arrived late.", "The lamp is bright.", "I love this soup."]}, index=list("abc")
        ),
        on="t",
        model=embedder,
    )
    out = similar(["slow delivery", "tasty food"], corpus, on="embedding", k=1, model=embedder)
    assert list(out["match"]) == ["a", "c"]


def test_a_text_too_long_for_the_encoder_is_one_error(embedder: Model) -> None:
    out = embed(["short", "word " * 3000, "also short"], model=embedder, progress=False)
    assert list(out["error"].isna()) == [True, False, True]
    assert list(out["embedding"].isna()) == [False, True, False]


JOB = """
    import sys
    sys.path.insert(0, {tests!r})
    from nbinfer.frames import complete
    from nbinfer.models.demo import demo_path
    from nbinfer.session import Model
    from support.demo_engine import open_demo
    rows = [f"What is {{i}} plus {{j}}?" for i in range(20) for j in range(20)]
    engine = open_demo(exact=True)
    model = Model(engine, "demo", backend="llamacpp", paths=(demo_path(),), config={{"exact": True}})
    complete(rows, model=model, max_tokens=12)
"""


@pytest.mark.parametrize("part", [0.1, 0.4, 0.8])
def test_after_kill_9_the_next_run_computes_the_rest_and_the_frame_is_the_same(part: float) -> None:
    program = [sys.executable, "-c", textwrap.dedent(JOB.format(tests=str(Path(__file__).parents[1])))]
    job = subprocess.Popen(program)
    deadline = time.monotonic() + 100
    while cache.info().entries < 400 * part and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    kept = cache.info().entries
    assert 400 * part <= kept < 400
    rows = [f"What is {i} plus {j}?" for i in range(20) for j in range(20)]
    model = demo(exact=True)
    model.config = {"exact": True}
    try:
        out = complete(rows, model=model, max_tokens=12)
        assert (out["source"] == "cache").sum() == kept
        undisturbed = complete(rows, model=model, max_tokens=12, cache=False)
        assert list(out["completion"]) == list(undisturbed["completion"])
    finally:
        model.engine.close()
