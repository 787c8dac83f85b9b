"""Labels and decisions come with probabilities, and a row without an answer never gets a default."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from support.fake_engine import FakeEngine
from support.frames import chat_model, embedding_model, engine_of, failing_on

from nbinfer.contract.errors import EngineError, NotSupported, RequestError
from nbinfer.contract.requests import CompletionRequest, ScoreRequest
from nbinfer.contract.results import ScoreResult
from nbinfer.frames import classify, last_run, submit
from nbinfer.frames import filter as keep_rows
from nbinfer.session import Model

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("results_folder")

LABELS = ["billing", "shipping", "other"]
TEXTS = ["a billing question", None, "about shipping", "a billing question"]


def scoring(rule: Any, **options: Any) -> Model:
    """A model whose answers have the log-probabilities ``rule(prompt, answer)``."""

    class Scoring(FakeEngine):
        def _run(self, job: Any) -> Any:
            request = job.request
            if not isinstance(request, ScoreRequest):
                return super()._run(job)
            prompt, tokens = self.render(request.question())
            values = [rule(prompt, answer) for answer in request.answers]
            return ScoreResult(logprobs=np.array(values, float), prompt_tokens=tokens, model="fake")

    return Model(Scoring(**options), "fake")


def by_last_word(prompt: str, answer: str) -> float:
    return -0.1 if answer in prompt.splitlines()[-2] else -4.0


def test_each_row_gets_one_label_and_its_share() -> None:
    frame = pd.DataFrame({"t": TEXTS}, index=["a", "b", "b", "c"])
    out = classify(frame, LABELS, "{t}", model=scoring(by_last_word))
    assert list(out.columns) == ["t", "label", "confidence", "error"]
    assert list(out.index) == ["a", "b", "b", "c"]
    assert [x if isinstance(x, str) else None for x in out["label"]] == [
        "billing",
        None,
        "shipping",
        "billing",
    ]
    assert list(out["label"].cat.categories) == LABELS
    share = 1 / (1 + 2 * np.exp(-3.9))
    assert out["confidence"].dtype == np.float32
    np.testing.assert_allclose(out["confidence"], [share, np.nan, share, share], rtol=1e-5)
    assert out["error"].isna().all()


def test_the_shares_of_all_labels_are_columns_when_asked_for() -> None:
    out = classify(["a billing question", None], LABELS, "{text}", probs=True, model=scoring(by_last_word))
    assert list(out.columns) == ["label", "p_billing", "p_shipping", "p_other", "confidence", "error"]
    shares = out[["p_billing", "p_shipping", "p_other"]].to_numpy()
    assert shares[0].sum() == pytest.approx(1)
    assert shares[0].argmax() == 0
    assert np.isnan(shares[1]).all()


@pytest.mark.parametrize("make", [pl.DataFrame, pa.table])
def test_other_families_get_their_categories(make: Any) -> None:
    out = classify(make({"t": TEXTS}), LABELS, "{t}", model=scoring(by_last_word))
    if isinstance(out, pl.DataFrame):
        assert out.schema["label"] == pl.Enum(LABELS)
        assert out["label"].to_list() == ["billing", None, "shipping", "billing"]
    else:
        assert out["label"].to_pylist() == ["billing", None, "shipping", "billing"]


def test_the_default_prompt_names_labels_and_descriptions_and_ends_with_the_row() -> None:
    model = chat_model()
    classify(["my {invoice}"], {"billing": "money {in} and out", "other": None}, model=model)
    request: Any = engine_of(model).requests[0]
    text = request.messages[-1]["content"]
    assert "- billing: money {in} and out\n- other\n" in text
    assert text.endswith("Text: my {invoice}")
    assert request.answers == ("billing", "other")
    assert request.priority == "batch"


class Topic(Enum):
    A = "billing"
    B = "shipping"


def test_an_enum_gives_its_values_as_labels() -> None:
    out = classify(["about shipping"], Topic, "{text}", model=scoring(by_last_word))
    assert list(out["label"].cat.categories) == ["billing", "shipping"]


def test_a_row_that_fails_has_no_label() -> None:
    class Lost(FakeEngine):
        def _run(self, job: Any) -> Any:
            if "bad" in self.render(job.request.question())[0]:
                raise EngineError("lost")
            return super()._run(job)

    out = classify(["bad", "good billing"], LABELS, model=Model(Lost(), "lost"), progress=False)
    assert out["label"].isna()[0]
    assert np.isnan(out["confidence"][0])
    assert out["error"][0] == "EngineError: lost"
    nothing = classify(["x"], LABELS, model=scoring(lambda p, a: -np.inf), progress=False)
    assert nothing["label"].isna()[0]
    assert "none of the answers" in nothing["error"][0]


def test_several_labels_each_by_its_own_question() -> None:
    frame = pd.DataFrame({"t": ["red and round", None, "nothing"]}, index=[7, 7, 8])

    def rule(prompt: str, answer: str) -> float:
        text, _, question = prompt.partition("\n\nDoes the label “")
        return -0.2 if (question.partition("”")[0] in text) == (answer.lower() == "yes") else -5.0

    model = scoring(rule)
    out = classify(frame, {"red": "a colour", "round": ""}, on="t", multi=True, probs=True, model=model)
    assert list(out.index) == [7, 7, 8]
    assert [None if x is None or x is pd.NA else list(x) for x in out["label"]] == [
        ["red", "round"],
        None,
        [],
    ]
    assert list(out.columns) == ["t", "label", "p_red", "p_round", "confidence", "error"]
    assert out["p_red"].iloc[0] > 0.9
    assert out["p_red"].iloc[2] < 0.1
    assert out["confidence"].iloc[2] == pytest.approx(1 - out["p_red"].iloc[2])
    assert np.isnan(out["confidence"].iloc[1])
    assert len(engine_of(model).requests) == 4
    assert "“red” (a colour) apply" in str(engine_of(model).requests[0])
    low = classify(frame, ["red", "round"], on="t", multi=True, threshold=0, model=scoring(rule))
    assert list(low["label"].iloc[2]) == ["red", "round"]


def test_a_label_that_fails_makes_its_row_fail() -> None:
    def rule(prompt: str, answer: str) -> float:
        if "“b”" in prompt and "bad" in prompt:
            raise EngineError("lost")
        return -1.0

    out = classify(["bad", "ok"], ["a", "b"], multi=True, model=scoring(rule), progress=False)
    assert out["error"].fillna("-").tolist() == ["EngineError: lost", "-"]
    assert [x is None or x is pd.NA for x in out["label"]] == [True, False]


def test_labels_come_from_the_journal() -> None:
    first = classify(TEXTS, LABELS, probs=True, model=chat_model())
    model = chat_model()
    again = classify(TEXTS, LABELS, probs=True, model=model)
    pd.testing.assert_frame_equal(first, again)
    assert engine_of(model).requests == []
    classify(TEXTS, [*LABELS, "more"], model=model)
    assert len(engine_of(model).requests) == 2


def test_an_engine_that_cannot_score_writes_a_label_instead() -> None:
    class Writing(FakeEngine):
        def submit(self, request: Any) -> Any:
            if isinstance(request, ScoreRequest):
                raise NotSupported("no scores here.")
            return super().submit(request)

    model = Model(Writing(), "writing")
    out = classify(["about shipping"], LABELS, "{text}", model=model)
    assert out["label"][0] == "shipping"
    assert np.isnan(out["confidence"][0])
    request = engine_of(model).requests[0]
    assert isinstance(request, CompletionRequest)
    assert request.constraint is not None
    assert request.constraint.value == tuple(LABELS)
    assert last_run().info["params"]["method"] == "generate"
    for options in ({"probs": True}, {"multi": True}, {"method": "logits"}):
        with pytest.raises(NotSupported):
            classify(["x"], LABELS, model=model, **options)


def test_it_runs_in_the_background_and_in_parts() -> None:
    run = submit(["x billing", "y"], operation="classify", labels=LABELS, multi=True, model=chat_model())
    parts = list(run)
    assert sorted(i for part in parts for i in part.index) == [0, 1]


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (["a"], {}, "at least 2"),
        (["a", "a"], {}, "different"),
        ([], {"multi": True}, "at least 1"),
        ("ab", {}, "labels is str"),
        (["a", ""], {}, "''"),
        (["a", 1], {}, "1"),
        (["a", "b"], {"method": "guess"}, "method="),
        (["a", "b"], {"method": "generate", "probs": True}, "no probabilities"),
        (["a", "b"], {"threshold": 2}, "0 to 1"),
        (["a", "b"], {"temperatur": 1}, "temperatur is unknown"),
    ],
)
def test_wrong_labels_or_options_raise_before_any_work(
    labels: Any, options: dict[str, Any], says: str
) -> None:
    model = chat_model()
    with pytest.raises(RequestError, match=says):
        classify(["x"], labels, model=model, **options)
    assert engine_of(model).requests == []


# -- filter -------------------------------------------------------------------------------------------------


def yes_to(*words: str) -> Model:
    def rule(prompt: str, answer: str) -> float:
        yes = any(word in prompt.split("Answer Yes")[0] for word in words)
        # "yes" and "Yes" share the probability between them.
        return -0.8 if (answer.lower() == "yes") == yes else -6.0

    return scoring(rule)


def test_rows_that_get_a_yes_stay_in_the_family_that_came_in() -> None:
    rows = ["late parcel", None, "nice lamp", "late again"]
    frame = pd.DataFrame({"t": rows}, index=["x", "x", "y", "z"])
    out = keep_rows(frame, "Is this about delay? {t}", model=yes_to("late"))
    assert list(out.columns) == ["t", "p"]
    assert list(out.index) == ["x", "z"]
    assert (out["p"] > 0.98).all()
    assert out["p"].dtype == np.float32
    assert keep_rows(rows, "{text}?", model=yes_to("late")) == ["late parcel", "late again"]
    kept = keep_rows(frame["t"], "{t}?", model=yes_to("late"))
    pd.testing.assert_series_equal(kept, frame["t"].iloc[[0, 3]])
    assert keep_rows(pl.DataFrame({"t": rows}), "{t}?", model=yes_to("late"))["t"].to_list() == [
        rows[0],
        rows[3],
    ]
    assert keep_rows(pl.Series(rows), "{text}?", model=yes_to("late")).to_list() == [rows[0], rows[3]]
    assert keep_rows(pa.table({"t": rows}), "{t}?", model=yes_to("late"))["t"].to_pylist() == [
        rows[0],
        rows[3],
    ]
    assert keep_rows(pa.array(rows), "{text}?", model=yes_to("late")).to_pylist() == [rows[0], rows[3]]


def test_a_mask_says_yes_no_or_nothing() -> None:
    rows = pd.Series(["late", None, "nice"], index=[5, 5, 6])
    mask = keep_rows(rows, "{text}?", mask=True, model=yes_to("late"))
    assert (str(mask.dtype), list(mask.index)) == ("boolean", [5, 5, 6])
    assert [None if x is pd.NA else x for x in mask] == [True, None, False]
    assert keep_rows(pl.Series(["late", None]), "{text}?", mask=True, model=yes_to("late")).to_list() == [
        True,
        None,
    ]


def test_a_row_without_an_answer_is_neither_yes_nor_no() -> None:
    def rule(prompt: str, answer: str) -> float:
        if "bad" in prompt:
            raise EngineError("lost")
        return -0.1 if answer == "Yes" else -3.0

    frame = pd.DataFrame({"t": ["good", "bad", None]})
    for threshold in (0.0, 0.5):
        assert list(
            keep_rows(frame, "{t}?", threshold=threshold, model=scoring(rule), progress=False)["t"]
        ) == ["good"]
    kept = keep_rows(frame, "{t}?", keep_null=True, model=scoring(rule), progress=False)
    assert len(kept) == 3
    assert list(kept["p"].isna()) == [False, True, True]
    mask = keep_rows(frame, "{t}?", mask=True, model=scoring(rule), progress=False)
    assert list(mask.isna()) == [False, True, True]
    assert list(last_run().frame()["error"].fillna("-")) == ["-", "EngineError: lost", "-"]


def test_the_threshold_is_a_probability() -> None:
    frame = pd.DataFrame({"t": ["a"]})
    even = scoring(lambda p, a: -1.0)
    assert len(keep_rows(frame, "{t}?", threshold=0.5, model=even)) == 1
    assert len(keep_rows(frame, "{t}?", threshold=0.51, model=even)) == 0
    with pytest.raises(RequestError, match="0 to 1"):
        keep_rows(frame, "{t}?", threshold=50, model=even)


def test_questions_can_be_chained_and_asked_again() -> None:
    frame = pd.DataFrame({"t": ["a", "b"]}, index=["x", "y"])
    even = scoring(lambda p, a: -1.0)
    half: Any = np.float32(0.5)
    twice = keep_rows(keep_rows(frame, "{t}?", model=even), "{t}!", threshold=half, model=even)
    assert twice.attrs["nbinfer"]["params"] == {"threshold": 0.5}
    assert list(twice.columns) == ["t", "p"]
    assert list(twice.index) == ["x", "y"]
    out = frame
    for _ in range(2):
        out = classify(out, ["one", "two"], on="t", probs=True, model=even)
    assert list(out.columns) == ["t", "label", "p_one", "p_two", "confidence", "error"]
    with pytest.raises(RequestError) as caught:
        keep_rows(frame.assign(p=1), "{t}?", model=even)
    assert "name='p2'" in str(caught.value)
    assert "keep" not in str(caught.value)
    with pytest.raises(RequestError) as caught:
        classify(frame.assign(p_one=1), ["one", "two"], on="t", probs=True, model=even)
    assert "name=" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.7), ("max_tokens", 5), ("stop", "x"), ("images", [b"x"]), ("adapter", "one")],
)
def test_options_without_an_effect_are_refused(name: str, value: Any) -> None:
    option, model = {name: value}, chat_model()
    calls: list[Callable[[], Any]] = [
        lambda: classify(["a"], LABELS, model=model, **option),
        lambda: classify(["a"], LABELS, multi=True, model=model, **option),
        lambda: keep_rows(["a"], "{text}?", model=model, **option),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=f"{name} is .*\n.*raw, system, think"):
            call()
    assert engine_of(model).requests == []


@pytest.mark.parametrize("make", [np.array, pd.Series, pd.Index, iter, pl.Series, tuple, pd.Categorical])
def test_labels_are_texts_in_any_container(make: Any) -> None:
    out = classify(["about shipping"], make(LABELS), "{text}", model=scoring(by_last_word))
    assert list(out["label"].cat.categories) == LABELS


def test_filter_needs_a_question_and_a_free_name() -> None:
    with pytest.raises(RequestError, match="which column"):
        keep_rows(pd.DataFrame({"t": ["a"]}), model=chat_model())
    with pytest.raises(RequestError, match="already has a column 'p'"):
        keep_rows(pd.DataFrame({"p": ["a"]}), "{p}?", model=chat_model())
    with pytest.raises(NotSupported):
        keep_rows(["a"], "{text}?", model=embedding_model())


def test_words_that_contain_yes_or_true_decide_nothing() -> None:
    # A substring test would keep all of them.
    rows = ["It is not true.", "untrue", "I cannot tell", "yesterday"]
    assert keep_rows(rows, "{text}", model=yes_to("never")) == []


def test_failures_are_summed_up_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    classify(["a", "bad"], LABELS, method="generate", model=chat_model(failing_on("bad", EngineError("x"))))
    assert capsys.readouterr().err == "nbinfer.classify: 1 of 2 rows failed: EngineError 1\n"
