"""The rows on a cluster's workers: the same frame, whatever happens to the workers."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from support import dask_backend
from support.sidecar import until

import nbinfer as nb
from nbinfer.contract.errors import ConfigError, EngineClosed, ModelNotFound, NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.frames import cache, classify, complete, embed, join, last_run, similar, submit
from nbinfer.frames.cluster import OnCluster
from nbinfer.frames.journal import close_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    make_cluster: Any = LocalCluster
    connect: Any = Client
    options = {"memory_limit": None, "dashboard_address": None, "silence_logs": 50}
    # Left alone, a local cluster takes a worker off that is not back 15 seconds after a death.
    patient = dask.config.set({"distributed.deploy.lost-worker-timeout": "10m"})
    with (
        patient,
        make_cluster(n_workers=2, threads_per_worker=1, **options) as cluster,
        connect(cluster) as client,
    ):
        client.register_plugin(dask_backend.RegisterBackend())
        yield client


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path))
    yield
    close_all()


@pytest.fixture
def fake() -> Any:
    return dask_backend.model()


def pids(client: Any) -> list[int]:
    return [worker["pid"] for worker in client.run(_identity).values()]


def _identity() -> dict[str, int]:
    return {"pid": os.getpid()}


def test_the_demo_model_gives_the_frame_that_it_gives_in_the_kernel(client: Any) -> None:
    index = pd.Index([f"r{i}" for i in range(6)] * 2, name="id")
    frame = pd.DataFrame({"q": [f"What is {i} plus 2?" for i in range(11)] + [None]}, index=index)
    with nb.load("demo", threads=1, exact=True) as model:
        here = complete(frame, on="q", model=model, max_tokens=12, cache=False, progress=False)
        there = complete(frame, on="q", model=model, max_tokens=12, client=client, progress=False)
        again = complete(frame, on="q", model=model, max_tokens=12, progress=False)
    moving = ["seconds", "source", "cached_tokens"]
    pd.testing.assert_frame_equal(there.drop(columns=moving), here.drop(columns=moving))
    assert there.index.name == "id"
    # What the workers computed is in this process' journal, under the same keys.
    assert set(again["source"].dropna()) <= {"cache", "duplicate"}
    assert there.attrs["nbinfer"]["digest"] == here.attrs["nbinfer"]["digest"] != ""


def test_each_worker_loads_the_model_once(client: Any, fake: Any) -> None:
    for text in ("a", "b"):
        complete([f"{text}{i}" for i in range(8)], model=fake, client=client, progress=False)
    loaded = client.run(dask_backend.models)
    assert set(loaded.values()) == {1}


def test_a_row_that_fails_there_fails_as_it_does_here(client: Any, fake: Any) -> None:
    rows = ["a", "bad", " ".join(["long"] * 60), None]
    here = complete(rows, model=fake, cache=False, progress=False)
    there = complete(rows, model=fake, client=client, cache=False, progress=False)
    assert there["completion"].tolist()[0] == "a"
    assert there["error"][2] == here["error"][2]
    assert "no" in there["error"][1]
    assert list(there["finish_reason"]) == list(here["finish_reason"])


def test_a_row_that_kills_its_worker_is_one_error_row(client: Any, fake: Any) -> None:
    rows = [f"row {i}" for i in range(12)]
    rows[7] = "poison"
    out = complete(rows, model=fake, client=client, progress=False)
    assert out["error"].notna().tolist() == [text == "poison" for text in rows]
    assert out["error"][7].startswith("WorkerDied: 2 workers died")
    assert [out["completion"][i] for i in range(12) if i != 7] == [t for t in rows if t != "poison"]
    assert any("lost its worker" in note for note in last_run().progress.notes)


def test_a_worker_killed_in_the_middle_loses_nothing(client: Any, fake: Any) -> None:
    rows = [f"slow {i}" for i in range(80)]
    first, *_ = pids(client)
    run = submit(rows, model=fake, client=client)
    until(lambda: run.progress.done >= 8)
    os.kill(first, signal.SIGKILL)
    out = run.wait(60)
    assert list(out["completion"]) == rows
    assert out["error"].isna().all()


def test_a_worker_that_joins_gets_the_model_and_its_share(client: Any, fake: Any) -> None:
    client.cluster.scale(1)
    until(lambda: len(client.nthreads()) == 1)
    try:
        run = submit([f"slow {i}" for i in range(100)], model=fake, client=client)
        until(lambda: run.progress.done >= 4)
        client.cluster.scale(2)
        assert run.wait(60)["error"].isna().all()
        until(lambda: len(client.run(dask_backend.models)) == 2)
        assert set(client.run(dask_backend.models).values()) == {1}
    finally:
        client.cluster.scale(2)


def test_an_interrupt_keeps_finished_rows_and_the_next_run_goes_on(client: Any, fake: Any) -> None:
    rows = [f"slow {i}" for i in range(200)]

    def press() -> None:
        until(lambda: last_run().progress.total == 200 and last_run().progress.done >= 12)
        _thread.interrupt_main()

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        complete(rows, model=fake, client=client, progress=False)
    kept = last_run().frame()["completion"].notna().sum()
    assert 12 <= kept < 200
    # The workers have stopped as well.
    until(lambda: set(client.run(dask_backend.busy).values()) == {0})
    out = complete(rows, model=fake, client=client, progress=False)
    assert list(out["completion"]) == rows
    assert (out["source"] == "cache").sum() == kept


def test_labels_and_vectors_are_computed_there_too(client: Any, fake: Any) -> None:
    labels = classify(["the lamp", "a soup"], ["lamp", "soup"], "{text}", model=fake, client=client)
    assert list(labels["label"]) == ["lamp", "soup"]
    vectors = dask_backend.model(Mode.EMBEDDING)
    here = embed(["a", "b c", None], model=vectors, cache=False)
    there = embed(["a", "b c", None], model=vectors, client=client)
    assert np.array_equal(nb.vectors(here["embedding"]), nb.vectors(there["embedding"]), equal_nan=True)


def test_a_search_and_a_join_embed_on_the_workers_what_they_would_embed_here(client: Any) -> None:
    notes = pd.DataFrame({"t": ["apples are red", "the sky is blue", None]}, index=["x", "x", "y"])
    asked = pd.DataFrame({"t": ["a red fruit", None, "blue sky"]})
    ends: dict[str, Any] = {"left_on": "t", "right_on": "t", "how": "left", "progress": False}
    with nb.load("demo-embed", mode="embedding", threads=1) as model:
        found = similar(asked, notes, on="t", k=2, model=model)
        joined = join(asked, notes, model=model, **ends)
        cache.clear()
        there = similar(asked, notes, on="t", k=2, model=model, client=client)
        assert set(last_run().frame()["error"].isna()) == {True}
        cache.clear()
        joined_there = join(asked, notes, model=model, client=client, **ends)
        assert cache.info().by_op == {"embed": 4}
    pd.testing.assert_frame_equal(there, found)
    pd.testing.assert_frame_equal(joined_there, joined)


def test_texts_that_are_too_long_can_be_cut_by_the_workers_count(client: Any, fake: Any) -> None:
    long = " ".join(f"w{i}" for i in range(90))
    out = complete([long, "a"], too_long="head", model=fake, client=client, max_tokens=10, progress=False)
    assert out["truncated"].tolist() == [True, False]
    assert out["error"].isna().all()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"client": "tcp://x"}, RequestError, "Client"),
        ({"endpoints": ["http://x"]}, RequestError, "two places"),
        ({"model": "no-such-model"}, ModelNotFound, "no model 'no-such-model'"),
        ({"temprature": 1}, RequestError, "temprature"),
    ],
)
def test_a_wrong_call_raises(client: Any, fake: Any, options: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        complete(["a"], **{"model": fake, "client": client, **options})


def test_what_meets_every_row_ends_the_run(client: Any) -> None:
    chat = dask_backend.model()
    with pytest.raises(NotSupported, match="needs embedding"):
        embed(["a"], model=chat, client=client)
    run = submit(["a"], model=chat, client=client)
    run.wait(30)
    made = run._plan.model
    assert isinstance(made, OnCluster)
    made.digest = "another file"
    with pytest.raises(ConfigError, match="different files"):
        made.submit(run._plan.work.request(["b"], [None])).result(30)


def test_a_cluster_that_lets_the_work_go_ends_the_run_and_keeps_its_rows(client: Any, fake: Any) -> None:
    run = submit([f"slow {i}" for i in range(200)], model=fake, client=client)
    until(lambda: run.progress.done >= 8)
    made = run._plan.model
    assert isinstance(made, OnCluster)
    client.cancel([chunk.future for chunk in made._chunks.copy() if chunk.future is not None], force=True)
    with pytest.raises(EngineClosed, match="Finished rows are kept"):
        run.wait(60)
    kept = int(run.frame()["completion"].notna().sum())
    assert 8 <= kept < 200
    until(lambda: set(client.run(dask_backend.busy).values()) == {0})


def test_released_workers_hold_no_model_and_the_next_call_loads_it_again(client: Any, fake: Any) -> None:
    complete(["a"], model=fake, client=client, progress=False)
    assert nb.release(client) >= 1
    assert set(client.run(dask_backend.models).values()) == {0}
    assert nb.release(client) == 0
    assert list(complete(["b"], model=fake, client=client, progress=False)["completion"]) == ["b"]


def test_workers_that_are_threads_leave_the_kernels_models_alone() -> None:
    make_cluster: Any = LocalCluster
    connect: Any = Client
    options = {"processes": False, "dashboard_address": ":0", "silence_logs": 50}
    with (
        nb.load("demo", threads=1) as model,
        make_cluster(n_workers=2, threads_per_worker=2, **options) as cluster,
        connect(cluster) as client,
    ):
        out = complete(["What is 1 plus 2?", None], model="demo", client=client, max_tokens=8)
        assert out["error"].isna().all()
        assert nb.loaded() == [model]
        assert nb.release(client) == 1
        assert model.infer("Hi", max_tokens=2).text


def test_a_function_that_names_the_package_travels_to_the_workers(client: Any) -> None:
    """As cells write them: the module is a global of the function, or in its closure."""
    found = client.submit(lambda: (nb.__name__, callable(nb.models)), pure=False).result(30)
    assert found == ("nbinfer", True)
