"""One bad row is one bad row; equal questions are asked once; wrong calls raise before any work."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from support.fake_engine import FakeEngine, echo
from support.frames import (
    asked,
    chat_model,
    embedding_model,
    engine_of,
    failing_on,
    last_text,
)

from nbinfer.contract.errors import (
    ContextOverflow,
    EngineClosed,
    EngineError,
    ModelNotFound,
    NotSupported,
    RequestError,
    SchemaError,
)
from nbinfer.contract.requests import CompletionRequest
from nbinfer.contract.results import Result, Usage
from nbinfer.frames import complete, extract, last_run, submit
from nbinfer.session import Model, session

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("results_folder")

ROWS = ["first", "bad one", "third"]


def test_a_failed_row_is_a_row_and_the_others_have_their_answers(capsys: pytest.CaptureFixture[str]) -> None:
    out = complete(ROWS, model=chat_model(failing_on("bad", EngineError("the device\nwas lost"))))
    assert list(out["completion"].fillna("-")) == ["first", "-", "third"]
    assert list(out["error"].fillna("-")) == ["-", "EngineError: the device was lost", "-"]
    assert list(out["finish_reason"]) == ["stop", "error", "stop"]
    assert capsys.readouterr().err == "nbinfer.complete: 1 of 3 rows failed: EngineError 1\n"


def test_an_over_long_row_in_the_middle_is_that_rows_error() -> None:
    long = "w " * 600
    model = chat_model(context_size=100)
    out = complete(["short", long, "also short"], model=model)
    assert list(out["completion"].fillna("-")) == ["short", "-", "also short"]
    assert out["error"][1].startswith("ContextOverflow: the prompt has 602 tokens; the context holds 100")
    assert out["prompt_tokens"][1] == 602
    assert len(engine_of(model).requests) == 2


def test_an_over_long_row_is_never_asked() -> None:
    model = chat_model(context_size=100)
    with pytest.raises(ContextOverflow):
        complete(["short", "w " * 600], model=model, on_error="raise")
    assert asked(model) == ["short"]


def test_a_row_that_the_engine_refuses_is_that_rows_error() -> None:
    class Picky(FakeEngine):
        def submit(self, request: Any) -> Any:
            if "bad" in last_text(request):
                raise RequestError("this row is not for me.")
            return super().submit(request)

    out = complete(["a", "bad", "c", "d"], model=Model(Picky(), "picky"))
    assert list(out["error"].fillna("-")) == ["-", "RequestError: this row is not for me.", "-", "-"]


@pytest.mark.parametrize("error", [NotSupported("no grammar here."), EngineClosed("it was unloaded.")])
def test_what_would_meet_every_row_raises_at_once(error: Exception) -> None:
    class Refusing(FakeEngine):
        def submit(self, request: Any) -> Any:
            raise error

    with pytest.raises(type(error), match=str(error)):
        complete(ROWS, model=Model(Refusing(), "refusing"))


def test_different_rows_refused_in_the_same_words_are_a_wrong_option() -> None:
    class Refusing(FakeEngine):
        tries = 0

        def submit(self, request: Any) -> Any:
            self.tries += 1
            raise RequestError("logit_bias names token 9, the vocabulary has 8.")

    engine = Refusing()
    with pytest.raises(RequestError, match="logit_bias"):
        complete([f"row {i}" for i in range(50)], model=Model(engine, "refusing"))
    assert engine.tries == 3


def test_on_error_raise_raises_the_first_error_and_keeps_what_was_done() -> None:
    model = chat_model(failing_on("bad", EngineError("lost")), parallel=1)
    frame = pd.DataFrame({"t": ["a", "bad", "c"]}, index=["x", "y", "z"])
    with pytest.raises(EngineError, match="lost") as caught:
        complete(frame, on="t", model=model, on_error="raise")
    assert "row 1 (index 'y')" in caught.value.__notes__[0]
    assert last_run().frame()["completion"].iloc[0] == "a"


NULLS = pd.DataFrame({"t": ["a", None, "c"]}, index=["x", "y", "z"])


@pytest.mark.parametrize(
    ("prompt", "nulls", "error"),
    [
        ("{t}", "error", RequestError),
        (lambda row: row["t"].upper(), "skip", AttributeError),
        (lambda row: {"a": "A"}[row["t"]], "skip", KeyError),
    ],
    ids=["null", "attribute", "key"],
)
def test_a_row_without_a_prompt_is_a_failure_like_any_other(prompt: Any, nulls: Any, error: Any) -> None:
    model = chat_model()
    with pytest.raises(error) as caught:
        complete(NULLS, prompt, nulls=nulls, model=model, on_error="raise")
    assert "row 1 (index 'y')" in caught.value.__notes__[0]
    out = complete(NULLS, prompt, nulls=nulls, model=model, on_error="stop")
    assert list(out["finish_reason"])[:2] == ["cancelled", "error"]
    assert engine_of(model).requests == []
    out = complete(NULLS, prompt, nulls=nulls, model=model)
    assert out["completion"].iloc[0].lower() == "a"
    assert [isinstance(source, str) for source in out["source"]][:2] == [True, False]


def test_a_kept_answer_that_breaks_its_rule_is_a_failure_again() -> None:
    for _ in range(2):
        with pytest.raises(SchemaError):
            complete(["a"], schema={"type": "object"}, model=chat_model(["no"]), on_error="raise")


def test_on_error_stop_returns_what_there_is() -> None:
    model = chat_model(failing_on("bad", EngineError("lost")), parallel=1)
    rows = ["a", "bad", *(f"c{i}" for i in range(200))]
    out = complete(rows, model=model, on_error="stop")
    assert len(out) == 202
    assert out["completion"][0] == "a"
    assert out["finish_reason"].iloc[-1] == "cancelled"
    assert len(engine_of(model).requests) < 100


@pytest.mark.parametrize(
    ("nulls", "finish", "answer", "error"),
    [
        ("skip", "skipped", "-", "-"),
        ("empty", "stop", "T: B: b", "-"),
        ("error", "error", "-", "NullField: column 'title' is null in this row."),
    ],
)
def test_a_null_field_follows_the_rule_for_nulls(nulls: Any, finish: str, answer: str, error: str) -> None:
    frame = pd.DataFrame({"title": [None, "a"], "body": ["b", "b"]})
    out = complete(frame, "T:{title} B: {body}", nulls=nulls, model=chat_model())
    assert out["finish_reason"][0] == finish
    assert out["completion"].fillna("-")[0].replace("T: B", "T: B") == answer
    assert out["error"].fillna("-")[0] == error
    assert out["completion"][1] == "T:a B: b"


def test_a_column_of_nothing_but_nulls_asks_nothing() -> None:
    model = chat_model()
    out = complete(pd.DataFrame({"t": [None, None]}), on="t", model=model)
    assert out["completion"].isna().all()
    assert engine_of(model).requests == []


def test_rows_that_cannot_be_rendered_are_their_own_errors() -> None:
    out = complete(["a", {"role": "user"}, b"raw"], model=chat_model())
    assert list(out["error"].fillna("-").str.partition(":")[0]) == ["-", "RequestError", "RequestError"]
    frame = pd.DataFrame({"n": ["1", "x"]})
    out = complete(frame, lambda row: f"{int(row['n'])}", model=chat_model())
    assert out["error"].fillna("-")[1].startswith("ValueError: invalid literal")
    out = complete(pd.DataFrame({"n": [1, "x"]}), "{n:.1f}", model=chat_model())
    assert list(out["completion"].fillna("-")) == ["1.0", "-"]


def test_results_go_to_their_rows_in_whatever_order_they_finish() -> None:
    def script(request: CompletionRequest) -> Iterable[Any]:
        # The longest text first: rows finish in the opposite order of the frame.
        return [0.05 if "0" in last_text(request) else 0.0, *echo(request)]

    rows = [f"{i % 7} row {i}" for i in range(60)]
    out = complete(rows, model=chat_model(script, parallel=8))
    assert list(out["completion"]) == rows


def test_seconds_are_each_rows_own_not_its_batchs_share() -> None:
    def script(request: CompletionRequest) -> Iterable[Any]:
        return [0.2, *echo(request)] if "slow" in last_text(request) else echo(request)

    seconds = complete(["slow", *(f"quick {i}" for i in range(9))], model=chat_model(script))["seconds"]
    assert seconds[0] >= 0.2
    assert seconds[1:].min() != seconds[0]


def test_rows_with_a_common_beginning_are_asked_side_by_side() -> None:
    model = chat_model(parallel=1)
    complete(["b 2", "a 1", "b 1", "a 2"], model=model)
    assert asked(model) == ["a 1", "a 2", "b 1", "b 2"]


def test_a_window_of_rows_is_with_the_engine_not_all_of_them() -> None:
    gate = threading.Event()
    model = chat_model(lambda r: [gate, *echo(r)], parallel=2)
    run = submit([f"row {i}" for i in range(500)], model=model)
    while engine_of(model).load().running < 2:
        pass
    load = engine_of(model).load()
    assert load.running + load.waiting <= 32
    gate.set()
    assert run.wait(60)["error"].isna().all()
    assert all(r.priority == "batch" for r in engine_of(model).requests)


def test_equal_questions_are_asked_once() -> None:
    model = chat_model()
    out = complete(pd.DataFrame({"t": ["a", "b", "a", "a"]}), on="t", model=model)
    assert sorted(asked(model)) == ["a", "b"]
    assert list(out["completion"]) == ["a", "b", "a", "a"]
    assert list(out["source"]) == ["run", "run", "duplicate", "duplicate"]


def test_without_a_seed_equal_questions_are_asked_again() -> None:
    model = chat_model()
    for _ in range(2):
        out = complete(["a", "a"], temperature=0.8, seed=None, model=model)
        assert list(out["source"]) == ["run", "run"]
    assert len(asked(model)) == 4


def seeds(model: Model) -> dict[str, int | None]:
    return {
        last_text(r): r.sampling.seed for r in engine_of(model).requests if isinstance(r, CompletionRequest)
    }


def test_a_rows_seed_depends_on_the_row_alone() -> None:
    one, two, three = chat_model(), chat_model(), chat_model()
    complete(["a", "b", "c"], temperature=1, seed=5, model=one, cache=False)
    complete(["c", "x", "a"], temperature=1, seed=5, model=two, cache=False)
    complete(["a"], temperature=1, seed=6, model=three, cache=False)
    assert seeds(one)["a"] == seeds(two)["a"] != seeds(three)["a"]
    assert len(set(seeds(one).values())) == 3


def test_several_answers_per_row() -> None:
    frame = pd.DataFrame({"t": ["a", None, "b"]}, index=[5, 5, 6])
    model = chat_model()
    out = complete(frame, on="t", n=2, temperature=0.7, model=model)
    assert list(out.index) == [5, 5, 5, 5, 6, 6]
    assert list(out["sample"]) == [0, 1, 0, 1, 0, 1]
    assert out["sample"].dtype == np.int16
    assert list(out["finish_reason"]) == ["stop"] * 2 + ["skipped"] * 2 + ["stop"] * 2
    assert len({r.sampling.seed for r in engine_of(model).requests}) == 4  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="same answer"):
        complete(frame, on="t", n=2, model=model)


def test_equal_rows_have_an_answer_each_where_answers_are_drawn() -> None:
    model = chat_model()
    rows = ["a", "b", "a", "a"]
    out = complete(rows, temperature=0.7, model=model)
    assert sorted(asked(model)) == ["a", "a", "a", "b"]
    assert len({r.sampling.seed for r in engine_of(model).requests}) == 4  # type: ignore[union-attr]
    assert set(out["source"]) == {"run"}
    # They are the question's first, second and third sample, however they were asked for.
    again = chat_model()
    out = complete(["a"], n=4, temperature=0.7, model=again)
    assert list(out["source"]) == ["cache"] * 3 + ["run"]
    out = complete(["b", *rows], temperature=0.7, model=again)
    assert list(out["source"]) == ["cache", "cache", "run", "cache", "cache"]


def test_options_reach_every_request() -> None:
    model = chat_model()
    complete(["a", "b"], system="short", max_tokens=7, stop=["\n"], top_p=0.5, temperature=0.3, model=model)
    for request in engine_of(model).requests:
        assert isinstance(request, CompletionRequest)
        assert request.messages is not None
        assert request.messages[0] == {"role": "system", "content": "short"}
        assert (request.max_tokens, request.stop, request.sampling.top_p) == (7, ("\n",), 0.5)
    raw = chat_model()
    complete(["a"], raw=True, model=raw)
    assert [r.prompt for r in engine_of(raw).requests if isinstance(r, CompletionRequest)] == ["a"]


@pytest.mark.parametrize(
    "options",
    [
        {"temprature": 1},
        {"top_p": 2},
        {"max_tokens": 0},
        {"on_error": "ignore"},
        {"nulls": "drop"},
        {"cache": "yes"},
        {"cache": 1},
        {"n": 0},
        {"too_long": "cut"},
        {"choices": []},
        {"progress": "yes"},
    ],
)
def test_a_wrong_option_raises_before_any_work(options: dict[str, Any]) -> None:
    model = chat_model()
    with pytest.raises(RequestError):
        complete(["a"], model=model, **options)
    assert engine_of(model).requests == []


@pytest.mark.parametrize("operator", [complete, partial(extract, schema={"properties": {"a": {}}})])
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("on_eror", "Did you mean on_error"),
        ("temprature", "Did you mean temperature"),
        ("top_q", "Did you mean top_p"),
        ("inplace", r"Nothing is changed in place: frame = nb\."),
    ],
)
def test_an_unknown_option_is_told_of_those_of_the_operator_and_of_the_model(
    operator: Any, option: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        operator(["a"], model=chat_model(), **{option: True})
    assert str(caught.value).count("\n") < 5
    assert "on_error" in str(caught.value)


def test_a_wrong_rule_is_found_before_a_server_is_asked() -> None:
    with pytest.raises(RequestError, match="nulls='drop'"):
        complete(["a"], nulls="drop", endpoints=["http://nowhere.invalid/v1"])  # type: ignore[arg-type]


def test_a_cut_answer_is_not_an_error_unless_a_rule_was_given() -> None:
    out = complete(["one two three"], max_tokens=2, model=chat_model())
    assert (out["completion"][0], out["finish_reason"][0], out["error"].isna()[0]) == (
        "one two ",
        "length",
        True,
    )
    cut = chat_model(lambda r: ['{"a"', ":", "1", "}"])
    out = complete(["x"], schema={"type": "object"}, max_tokens=2, model=cut)
    assert out["completion"].isna()[0]
    assert out["error"][0].startswith("Truncated: the answer reached max_tokens=2")
    assert out["finish_reason"][0] == "length"


def parts(model: Model) -> list[Any]:
    return [
        r.messages[-1]["content"]
        for r in engine_of(model).requests
        if isinstance(r, CompletionRequest) and r.messages is not None
    ]


def test_each_row_can_have_its_own_images(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    frame = pd.DataFrame({"t": ["a", "b", "c", "d"], "photo": [str(path), b"two", None, [path, b"two"]]})
    model = chat_model()
    out = complete(frame, "What is it? {t}", images="photo", system="be brief", model=model)
    assert list(out["finish_reason"]) == ["stop", "stop", "skipped", "stop"]
    assert out.attrs["nbinfer"]["params"]["images"] == "photo"
    found = {
        content[-1]["text"]: [part["image_url"]["url"] for part in content[:-1]] for content in parts(model)
    }
    one, two = (f"data:image/png;base64,{data}" for data in ("b25l", "dHdv"))
    assert found == {"What is it? a": [one], "What is it? b": [two], "What is it? d": [one, two]}
    assert {r.messages[0]["content"] for r in engine_of(model).requests} == {"be brief"}  # type: ignore[union-attr,index]
    again = chat_model()
    complete(frame, "What is it? {t}", images="photo", system="be brief", model=again)
    assert engine_of(again).requests == []
    # The question may be the same for all: the pictures differ.
    complete(frame, "What is it?", images="photo", model=again)
    assert len(parts(again)) == 3


def test_an_image_that_cannot_be_read_is_its_rows_error() -> None:
    frame = pd.DataFrame({"photo": ["/no/such.png", 7, b"x"]})
    out = complete(frame, "What is it?", images="photo", model=chat_model())
    assert out["error"][0].startswith("RequestError: cannot read the image /no/such.png")
    assert out["error"][1].startswith("RequestError: an image is int")
    assert out["error"].isna()[2]


@pytest.mark.parametrize("options", [{"images": "foto"}, {"raw": True}, {"too_long": "head"}])
def test_a_wrong_use_of_images_raises_before_any_work(options: dict[str, Any]) -> None:
    frame = pd.DataFrame({"t": ["a"], "photo": [b"x"]})
    model = chat_model()
    with pytest.raises(RequestError, match=r"photo|images"):
        complete(frame, "{t}", model=model, **{"images": "photo", **options})
    assert engine_of(model).requests == []


@pytest.mark.parametrize("make", [np.array, pd.Series, pd.Index, iter, pd.Categorical])
def test_choices_are_texts_in_any_container(make: Any) -> None:
    out = complete(["is it red?"], choices=make(["red", "blue"]), model=chat_model())
    assert out["completion"][0] == "red"
    assert out.attrs["nbinfer"]["params"]["choices"] == ["red", "blue"]


def test_numbers_of_numpy_are_numbers() -> None:
    numbers: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "max_tokens": np.int64(7),
        "seed": np.int32(3),
        "n": np.int8(2),
        "logprobs": np.int16(1),
        "top_p": np.float64(0.25),
    }
    model = chat_model()
    complete(["a"], model=model, **numbers)
    plain = {name: number.item() for name, number in numbers.items()}
    assert set(complete(["a"], model=model, **plain)["source"]) == {"cache"}


@pytest.mark.parametrize(
    "rule", [{"regex": "[a-z ]+!"}, {"schema": {"type": "object"}}, {"json": True}], ids=str
)
def test_an_answer_that_the_engine_cut_before_it_kept_its_rule_has_its_counts(rule: dict[str, Any]) -> None:
    def script(request: CompletionRequest) -> list[Any]:
        del request
        usage = Usage(prompt_tokens=5, completion_tokens=2)
        result = Result(text="{ on", finish_reason="length", usage=usage, error="it was cut")
        return [SchemaError("it was cut", raw=result.text, result=result)]

    for source in ("run", "cache"):
        out = complete(["x"], max_tokens=2, model=chat_model(script), **rule)
        assert out["completion"].isna()[0]
        assert out["error"][0].startswith("Truncated: the answer reached max_tokens=2")
        assert (out["finish_reason"][0], out["source"][0]) == ("length", source)
        assert (out["prompt_tokens"][0], out["completion_tokens"][0]) == (5, 2)


def test_choices_reach_the_engine_and_an_unfit_answer_is_an_error() -> None:
    model = chat_model()
    out = complete(["is it red?", "is it blue?"], choices=["red", "blue"], model=model)
    assert list(out["completion"]) == ["red", "blue"]
    broken = complete(["x"], schema={"type": "object"}, model=chat_model(["not json"]))
    assert broken["error"][0].startswith("SchemaError: the answer is not valid JSON")


def test_logprobs_become_columns() -> None:
    out = complete(["one two", None], logprobs=2, model=chat_model())
    assert out["mean_logprob"].dtype == np.float32
    assert out["mean_logprob"][0] == pytest.approx(-0.1)
    assert [t["token"] for t in out["logprobs"][0]] == ["one ", "two"]
    assert [t["token"] for t in out["logprobs"][0][0]["top"]] == ["one ", "one 1"]
    assert out["mean_logprob"].isna()[1]
    again = complete(["one two", None], logprobs=2, model=chat_model())
    assert again["source"][0] == "cache"
    assert again["logprobs"][0] == out["logprobs"][0]


def test_a_model_of_another_mode_is_refused() -> None:
    with pytest.raises(NotSupported, match="needs completion"):
        complete(["a"], model=embedding_model())


def test_the_model_is_the_named_or_the_only_loaded_one() -> None:
    with pytest.raises(ModelNotFound):
        complete(["a"])
    model = chat_model()
    session.add(model)
    try:
        assert complete(["a"])["completion"][0] == "a"
        assert complete(["b"], model="fake")["completion"][0] == "b"
    finally:
        model.unload()


def test_a_model_that_is_unloaded_in_between_ends_the_run_and_keeps_its_rows() -> None:
    gate = threading.Event()
    model = chat_model(lambda r: [gate, *echo(r)] if "slow" in last_text(r) else echo(r), parallel=2)
    run = submit(["a", "slow", "b"], model=model)
    while run.progress.done < 2:
        pass
    model.engine.close()
    with pytest.raises(EngineClosed):
        run.wait(30)
    assert list(run.frame()["finish_reason"]) == ["stop", "cancelled", "stop"]


# -- a run in the background --------------------------------------------------------------------------------


def test_a_background_run_shows_its_frame_at_any_time() -> None:
    gate = threading.Event()
    model = chat_model(lambda r: [gate, *echo(r)] if "slow" in last_text(r) else echo(r), parallel=2)
    run = submit(["quick", "slow"], model=model)
    assert last_run() is run
    while run.progress.done < 1:
        pass
    half = run.frame()
    assert list(half["completion"].fillna("-")) == ["quick", "-"]
    assert half["finish_reason"].isna()[1]
    assert not run.done
    with pytest.raises(TimeoutError):
        run.wait(0.01)
    with pytest.raises(RequestError, match="not over"):
        run.retry_failed()
    gate.set()
    assert list(run.wait(30)["completion"]) == ["quick", "slow"]
    assert "2/2 rows done" in repr(run)


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame])
def test_what_is_done_to_a_frame_meanwhile_does_not_reach_the_rows_of_a_run(make: Any) -> None:
    frame = make({"t": ["a", "b"]})
    run = submit(frame, on="t", model=chat_model())
    if isinstance(frame, pl.DataFrame):
        frame.insert_column(0, pl.Series("t2", ["x", "y"]))
    else:
        frame["t"] = ["x", "y"]
    out = run.wait(30)
    assert list(out.columns)[:2] == ["t", "completion"]
    assert list(out["t"]) == list(out["completion"]) == ["a", "b"]


def test_a_cancelled_run_keeps_its_rows_and_can_go_on() -> None:
    gate = threading.Event()
    model = chat_model(lambda r: [gate, *echo(r)] if "slow" in last_text(r) else echo(r), parallel=2)
    run = submit(["quick", "slow"], model=model)
    while run.progress.done < 1:
        pass
    run.cancel()
    out = run.wait(30)
    assert list(out["finish_reason"]) == ["stop", "cancelled"]
    assert out["error"].isna().all()
    assert engine_of(model).cancelled == 1
    gate.set()
    assert list(run.retry_failed().wait(30)["completion"]) == ["quick", "slow"]
    assert asked(model) == ["quick", "slow", "slow"]


def test_retry_asks_only_for_what_failed() -> None:
    tries: list[str] = []

    def script(request: CompletionRequest) -> Iterable[Any]:
        text = last_text(request)
        tries.append(text)
        return [EngineError("once")] if text == "flaky" and tries.count("flaky") == 1 else echo(request)

    frame = pd.DataFrame({"t": ["a", "flaky", None, "flaky"]})
    model = chat_model(script)
    run = submit(frame, model=model, on="t")
    assert run.wait(30)["error"].notna().sum() == 2
    out = run.retry_failed().wait(30)
    assert list(out["completion"].fillna("-")) == ["a", "flaky", "-", "flaky"]
    assert out["error"].isna().all()
    assert sorted(tries) == ["a", "flaky", "flaky"]


def test_iterating_a_run_gives_every_row_once_as_it_finishes() -> None:
    gate = threading.Event()
    model = chat_model(lambda r: [gate, *echo(r)] if "slow" in last_text(r) else echo(r), parallel=2)
    frame = pd.DataFrame({"t": ["slow", "a", "b", "a"]}, index=list("wxyz"))
    parts = []
    for part in submit(frame, on="t", model=model):
        parts.append(part)
        gate.set()
    together = pd.concat(parts)
    assert sorted(together.index) == list("wxyz")
    assert parts[-1].index[-1] == "w"
    assert together.loc["z", "source"] == "duplicate"


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(RequestError, match="'complete'"):
        submit(["a"], operation="compleat", model=chat_model())


@pytest.mark.parametrize(
    ("operation", "says"),
    [("classify", r"^classify\(\) missing .*'labels'"), ("embed", r"^embed\(\) got an unexpected .*'top_p'")],
)
def test_arguments_in_the_background_are_those_of_the_operator(operation: str, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        submit(["a"], operation=operation, top_p=0.5, model=chat_model())


def test_last_run_before_any_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbinfer.frames.run._last", None)
    with pytest.raises(RequestError, match="nothing has run yet"):
        last_run()
