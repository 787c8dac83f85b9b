"""Frames over several real servers: the same frame, and no row lost with a server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from support import sidecar as support

import nbinfer as nb
from nbinfer.contract.errors import BackendUnavailable, RequestError
from nbinfer.frames import cache, classify, complete, embed, last_run, submit
from nbinfer.frames.fanout import FanOut

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psutil

ROWS = [f"What is {i} plus {i % 7}?" for i in range(60)]
OPTIONS: dict[str, Any] = {"max_tokens": 12, "progress": False}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from nbinfer.frames.journal import close_all

    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path))
    yield tmp_path
    close_all()


@pytest.fixture(scope="module")
def second() -> Iterator[support.Sidecar]:
    """A server that may be hurt."""
    folder = support.make_folder()
    process = support.start(folder, "demo", "--port", "0", "--ram", "4G")
    try:
        yield support.ready(process, folder)
    finally:
        support.end(process, folder)


def endpoint(server: support.Sidecar, **more: Any) -> dict[str, Any]:
    return {"base_url": server.address, "api_key": server.token, "model": "demo", **more}


def runner(server: support.Sidecar) -> psutil.Process:
    """Return the process with the model; the service lives without it, and starts another when asked."""
    (found,) = (
        process
        for process in support.processes(server.folder)
        if any("sidecar.runner" in part for part in process.cmdline())
    )
    return found


def test_two_servers_give_the_frame_that_the_kernel_gives(
    served: support.Sidecar, second: support.Sidecar
) -> None:
    frame = pd.DataFrame({"q": [*ROWS[:20], None]}, index=pd.Index(range(100, 121), name="id"))
    there = complete(frame, on="q", endpoints=[endpoint(served), endpoint(second)], **OPTIONS)
    with nb.load("demo", threads=1) as model:
        again = complete(frame, on="q", model=model, **OPTIONS)
        here = complete(frame, on="q", model=model, cache=False, **OPTIONS)
    # The servers said which weights they run, so that their answers are the kernel's as well.
    assert set(again["source"].dropna()) == {"cache"}
    assert there.attrs["nbinfer"]["digest"] == here.attrs["nbinfer"]["digest"] != ""
    same = there["completion"].fillna("") == here["completion"].fillna("")
    # Batches of another shape may flip a near tie.
    assert same.sum() >= 19
    pd.testing.assert_index_equal(there.index, here.index)


def test_one_dies_in_the_middle_and_no_row_is_lost(served: support.Sidecar, second: support.Sidecar) -> None:
    rows = [f"{row} Tell me more of number {i}." for i, row in enumerate(ROWS * 4)]
    run = submit(rows, endpoints=[endpoint(served), endpoint(second)], max_tokens=60)
    model = run._plan.model
    assert isinstance(model, FanOut)
    hurt = model._places[1]
    victim = runner(second)
    support.until(lambda: hurt.answered >= 3 and hurt.running)
    victim.kill()
    out = run.wait(100)
    assert out["error"].isna().all()
    assert out["completion"].notna().all()
    assert len(out) == len(rows)
    assert any("was lost after" in note for note in run.progress.notes)


def test_a_server_that_is_gone_for_good_is_done_without(served: support.Sidecar) -> None:
    folder = support.make_folder()
    process = support.start(folder, "demo", "--port", "0", "--ram", "4G")
    third = support.ready(process, folder)
    try:
        run = submit(ROWS, endpoints=[endpoint(third), endpoint(served)], max_tokens=12, cache="refresh")
        support.until(lambda: run.progress.done >= 10)
    finally:
        support.end(process, folder)
    out = run.wait(100)
    assert out["error"].isna().all()
    assert any("was lost after" in note for note in last_run().progress.notes)


def test_labels_and_vectors_come_from_servers_too(served: support.Sidecar, second: support.Sidecar) -> None:
    both = [endpoint(served), endpoint(second)]
    labels = classify(["my lamp is broken", "hot soup"], ["light", "food"], endpoints=both, progress=False)
    with nb.load("demo", threads=1) as model:
        here = classify(["my lamp is broken", "hot soup"], ["light", "food"], model=model, progress=False)
    assert set(last_run().frame()["label"]) == set(here["label"]) == set(labels["label"])
    with pytest.raises(RequestError, match="which model"):
        embed(["a"], endpoints=[{**both[0], "model": None}])


def test_an_address_that_asks_for_a_key_says_so(served: support.Sidecar) -> None:
    with pytest.raises(BackendUnavailable, match="api_key"):
        complete(["a"], endpoints=[endpoint(served, api_key="wrong")])
    with pytest.raises(RequestError, match="there is no model 'x'"):
        complete(["a"], endpoints=[endpoint(served, model="x")])


_JOB = """
    import os, sys
    import nbinfer as nb
    rows = [f"What is {i % 97} plus {i // 97}?" for i in range(80)]
    model = nb.load("demo", where="sidecar", threads=1, exact=True)
    print("loaded", flush=True)
    nb.complete(rows, model=model, max_tokens=12, progress=False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "interrupt"])
def test_a_stopped_job_of_the_sidecar_goes_on_where_it_was(runtime: Path, how: signal.Signals) -> None:
    rows = [f"What is {i % 97} plus {i // 97}?" for i in range(80)]
    stop_at = random.Random(how).randint(8, 60)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_JOB)],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "loaded\n"
        support.until(lambda: cache.info().entries >= stop_at)
        job.send_signal(how)
        assert job.wait(30) != 0
    kept = cache.info().entries
    assert stop_at <= kept < len(rows)
    with nb.load("demo", where="sidecar", threads=1, exact=True) as model:
        # The sidecar does not go on with what nobody waits for.
        support.until(lambda: model.engine.load().running == 0)
        out = complete(rows, model=model, **OPTIONS)
        assert (out["source"] == "run").sum() == len(rows) - kept
        whole = complete(rows, model=model, cache=False, **OPTIONS)
    assert list(out["completion"]) == list(whole["completion"])
