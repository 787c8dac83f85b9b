"""Texts that do not fit: an error of their row, or cut where it was asked for, and said so."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from support.fake_engine import FakeEngine, count_tokens
from support.frames import asked, chat_model, embedding_model, engine_of, reranking_model

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import EmbeddingRequest
from nbinfer.frames import classify, complete, embed, extract, last_run, rerank
from nbinfer.frames import filter as keep_rows
from nbinfer.session import Model

pytestmark = pytest.mark.usefixtures("results_folder")

LONG = " ".join(f"w{i}" for i in range(300))


def words(text: str) -> list[str]:
    return [w for w in text.split() if w.startswith("w")]


@pytest.mark.parametrize("policy", ["head", "tail", "middle"])
def test_the_rows_own_text_is_cut_and_the_template_stays(policy: Any) -> None:
    frame = pd.DataFrame({"title": ["T", "U"], "body": ["short", LONG]})
    model = chat_model(context_size=100)
    out = complete(frame, "Sum up {title}: {body}\nIn a line.", too_long=policy, max_tokens=20, model=model)
    assert out["error"].isna().all()
    assert list(out["truncated"]) == [False, True]
    sent = next(text for text in asked(model) if "U" in text)
    assert sent.startswith("Sum up U: ")
    assert sent.endswith("\nIn a line.")
    kept = words(sent)
    ends = {"head": ("w0", None), "tail": (None, "w299"), "middle": ("w0", "w299")}[policy]
    assert ends[0] is None or kept[0] == ends[0]
    assert ends[1] is None or kept[-1] == ends[1]
    # As much as fits beside the template and an answer of 20 tokens.
    assert 60 <= len(kept) <= 80
    assert engine_of(model).render(engine_of(model).requests[1])[1] <= 80  # type: ignore[arg-type]


def test_cut_rows_are_counted_in_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    complete([LONG, "a"], too_long="head", model=chat_model(context_size=100), max_tokens=10)
    assert "1 of 2 rows were cut to fit the model" in capsys.readouterr().err


def test_without_the_rule_nothing_is_cut_and_no_column_says_so() -> None:
    out = complete([LONG], model=chat_model(context_size=100), progress=False)
    assert out["error"][0].startswith("ContextOverflow")
    assert "truncated" not in out


def test_a_template_that_is_too_long_by_itself_is_still_an_error() -> None:
    out = complete(
        [LONG], LONG + " {text}", too_long="head", model=chat_model(context_size=100), progress=False
    )
    assert out["error"][0].startswith("ContextOverflow")
    assert not out["truncated"][0]


class Counting(FakeEngine):
    """The fake engine with its tokenizer open, as the real ones have it."""

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = True) -> list[int]:
        return list(range(count_tokens(text)))


def test_long_texts_are_cut_for_embeddings_too() -> None:
    engine = Counting(mode=Mode.EMBEDDING, context_size=50)
    model = Model(engine, "fake", mode=Mode.EMBEDDING)
    out = embed(["short", LONG, None], too_long="tail", model=model)
    assert list(out.columns) == ["embedding", "n_tokens", "error", "truncated"]
    assert list(out["truncated"]) == [False, True, False]
    assert out["n_tokens"][1] == 50
    texts = [t for r in engine.requests if isinstance(r, EmbeddingRequest) for t in r.texts]
    assert max(texts, key=len).endswith("w299")


def test_an_engine_that_cannot_count_refuses_to_cut() -> None:
    with pytest.raises(NotSupported, match="cannot be cut"):
        embed([LONG], too_long="head", model=embedding_model(context_size=50))
    with pytest.raises(TypeError):
        rerank("q", [LONG], too_long="head", model=reranking_model())  # type: ignore[call-arg]


def test_labels_fields_and_filters_take_the_rule_as_well() -> None:
    model = chat_model(context_size=200)
    out = classify([LONG], ["w0", "other"], too_long="head", model=model)
    assert (out["label"][0], out["truncated"][0]) == ("w0", True)
    both = classify([LONG], ["w0", "zz"], multi=True, too_long="head", model=model)
    assert both["truncated"][0]
    assert keep_rows([LONG, "a"], "{text}?", too_long="head", threshold=0, model=model) == [LONG, "a"]
    assert list(last_run().frame()["truncated"]) == [True, False]
    fields = extract([LONG], int, "{text}", too_long="head", model=chat_model(["7"], context_size=100))
    assert (fields["value"][0], fields["truncated"][0]) == (7, True)


def test_a_function_hides_what_to_cut() -> None:
    with pytest.raises(RequestError, match="hides which"):
        complete(["a"], lambda text: text, too_long="head", model=chat_model())
