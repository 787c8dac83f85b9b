"""What was computed is never computed again: after a re-run, an interrupt, kill -9, and across processes."""

from __future__ import annotations

import _thread
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from support.fake_engine import echo
from support.frames import asked, chat_model, embedding_model, engine_of, failing_on, last_text

from nbinfer.contract.errors import ConfigError, EngineError
from nbinfer.contract.requests import CompletionRequest
from nbinfer.frames import cache, complete, embed, last_run, submit
from nbinfer.frames import journal as journals
from nbinfer.frames.journal import Journal, JournalError, JournalWarning, Keys, open_journal
from nbinfer.frames.outcomes import Record
from nbinfer.frames.work import CompletionWork, EmbeddingWork, RerankWork

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

ROWS = [f"row {i}" for i in range(20)]
CODEC = CompletionWork("complete", CompletionRequest(prompt=""))


@pytest.fixture(autouse=True)
def folder(results_folder: Path) -> Path:
    return results_folder


# -- the same question has one answer -----------------------------------------------------------------------


def test_a_second_run_computes_nothing_and_gives_the_same_frame() -> None:
    first = complete(ROWS, "say {text}", model=chat_model())
    model = chat_model()
    again = complete(ROWS, "say {text}", model=model)
    assert engine_of(model).requests == []
    assert set(again["source"]) == {"cache"}
    pd.testing.assert_frame_equal(again.drop(columns="source"), first.drop(columns="source"))


def test_rows_added_later_are_the_only_ones_computed() -> None:
    complete(ROWS[:15], model=chat_model())
    model = chat_model()
    out = complete(["new", *ROWS], model=model)
    assert sorted(asked(model)) == sorted(["new", *ROWS[15:]])
    assert list(out["completion"]) == ["new", *ROWS]


def test_refresh_computes_again_and_replaces_and_false_leaves_it_alone() -> None:
    complete(["a"], model=chat_model(["old"]))
    assert complete(["a"], cache=False, model=chat_model(["other"]))["completion"][0] == "other"
    assert complete(["a"], model=chat_model(["new"]))["completion"][0] == "old"
    assert complete(["a"], cache="refresh", model=chat_model(["new"]))["completion"][0] == "new"
    assert complete(["a"], model=chat_model(["newer"]))["completion"][0] == "new"


@pytest.mark.parametrize(
    "change",
    [
        {"system": "be brief"},
        {"max_tokens": 5},
        {"temperature": 0.5},
        {"stop": "x"},
        {"choices": ["one", "two"]},
        {"raw": True},
        {"logprobs": 1},
        {"repeat_penalty": 1.1},
        {"think": True},
        {"images": [b"one"]},
        {"tools": [{"type": "function", "function": {"name": "now"}}]},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_different_instruction_never_shares_an_answer(change: dict[str, Any]) -> None:
    complete(["a"], model=chat_model())
    model = chat_model()
    complete(["a"], model=model, **change)
    assert len(engine_of(model).requests) == 1


def test_other_weights_never_share_an_answer() -> None:
    complete(["a"], model=chat_model(model="one"))
    model = chat_model(model="two")
    complete(["a"], model=model)
    assert len(engine_of(model).requests) == 1


def test_other_adapters_and_cache_types_never_share_an_answer(tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    for config, computed in (
        ({}, 1),
        ({"kv_type": "q8_0"}, 1),
        ({"exact": True}, 1),
        ({"exact": False}, 0),
        ({"lora": one}, 1),
        ({"lora": two}, 1),
        ({"lora": {"one": one}}, 1),
        ({"projector": one}, 1),
        ({"projector": two}, 1),
        ({"reasoning_budget": 0}, 1),
        ({"context_size": 100, "parallel": 2}, 0),
        ({"lora": str(one)}, 0),
    ):
        model = chat_model()
        model.config = config
        complete(["a"], model=model)
        assert len(engine_of(model).requests) == computed, config


def test_without_a_bound_the_context_is_part_of_the_question() -> None:
    complete(["a"], max_tokens=None, model=chat_model(context_size=100))
    for size, computed in ((100, 0), (200, 1)):
        model = chat_model(context_size=size)
        complete(["a"], max_tokens=None, model=model)
        assert len(engine_of(model).requests) == computed


def test_other_pictures_never_share_an_answer() -> None:
    for picture, computed in ((b"one", 1), (b"two", 1), (b"one", 0)):
        model = chat_model()
        complete(["a"], images=[picture], model=model)
        assert len(engine_of(model).requests) == computed


@pytest.mark.parametrize("rule", [{}, {"regex": ".*x"}, {"schema": {"type": "object"}}], ids=str)
def test_an_answer_that_the_context_cut_is_computed_again_in_a_larger_one(rule: dict[str, Any]) -> None:
    text = ["{", *[" "] * 20, "}"]
    small = chat_model(text, context_size=10)
    assert complete(["a"], model=small, **rule)["finish_reason"][0] == "length"
    large = chat_model(text, context_size=100)
    assert complete(["a"], model=large, **rule)["finish_reason"][0] == "stop"
    # One that max_tokens cut is the same in any context.
    assert complete(["a"], max_tokens=3, model=large, **rule)["finish_reason"][0] == "length"
    assert complete(["a"], max_tokens=3, model=small, **rule)["source"][0] == "cache"


def test_templates_that_render_alike_share_and_those_that_do_not_do_not() -> None:
    frame = pd.DataFrame({"t": ["a"], "u": ["a"]})
    complete(frame, "say {t}", model=chat_model())
    model = chat_model()
    complete(frame, "say {u}", model=model)
    complete(frame, lambda row: f"say {row['t']}", model=model)
    assert engine_of(model).requests == []
    complete(frame, "tell {t}", model=model)
    assert len(engine_of(model).requests) == 1


def test_what_does_not_change_an_answer_is_not_in_the_key() -> None:
    complete(["a", "b"], model=chat_model(parallel=1), seed=1, top_p=0.9)
    model = chat_model(parallel=8, context_size=256)
    out = complete(["b", "a"], model=model, seed=2, top_p=0.5, nulls="empty", progress=False)
    assert engine_of(model).requests == []
    assert list(out["completion"]) == ["b", "a"]


def test_above_temperature_zero_the_seed_and_the_cuts_are_in_the_key() -> None:
    for options, computed in (({}, 1), ({}, 0), ({"seed": 1}, 1), ({"top_p": 0.5}, 1), ({"n": 2}, 1)):
        model = chat_model()
        complete(["a"], temperature=1, model=model, **options)
        assert len(engine_of(model).requests) == computed, options


def test_errors_are_not_kept_but_answers_that_break_a_rule_are() -> None:
    complete(["bad"], model=chat_model(failing_on("bad", EngineError("lost"))))
    assert complete(["bad"], model=chat_model())["source"][0] == "run"
    first = complete(["x"], schema={"type": "object"}, model=chat_model(["not json"]))
    again = complete(["x"], schema={"type": "object"}, model=chat_model(["not asked"]))
    assert again["source"][0] == "cache"
    assert again["error"][0] == first["error"][0]


def test_keys_tell_text_from_conversations_and_samples_apart() -> None:
    keys = Keys({"op": "complete"})
    message = ({"role": "user", "content": "a"},)
    made = [keys.key("a"), keys.key("a", 1), keys.key(message), keys.key('[{"content":"a","role":"user"}]')]
    made.append(Keys({"op": "embed"}).key("a"))
    assert len(set(made)) == 5
    assert keys.key(({"content": "a", "role": "user"},)) == keys.key(message)


def test_keys_do_not_depend_on_the_process() -> None:
    # What a key covers may only change together with KEY_VERSION: else every journal is silently lost.
    program = (
        "from nbinfer.frames.journal import Keys;"
        "print(Keys({'b': 1, 'a': [1.5, None, 'ä']}).key(({'role': 'user', 'content': 'é'},), 2).hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1", "77")
    }
    canonical = json.dumps({"key": 2, "b": 1, "a": [1.5, None, "ä"]}, sort_keys=True, separators=(",", ":"))
    content = json.dumps([{"content": "é", "role": "user"}], sort_keys=True, separators=(",", ":"))
    assert seen == {hashlib.sha256(f"{canonical}\0002 j{content}".encode()).hexdigest()}


@pytest.mark.parametrize(
    ("work", "value"),
    [(CODEC, "é\n\0 \U0001f600"), (CODEC, ""), (EmbeddingWork(), [0.1, -2.0]), (RerankWork(), -1.25)],
)
def test_values_come_back_as_they_were(work: Any, value: Any) -> None:
    back = work.decode(work.encode(value))
    assert list(back) == pytest.approx(value) if isinstance(value, list) else back == value


# -- interrupts ---------------------------------------------------------------------------------------------


def interrupting(after: int) -> Any:
    """Script: the main thread is interrupted when ``after`` rows have been answered."""
    count = 0
    lock = threading.Lock()

    def script(request: CompletionRequest) -> Iterable[Any]:
        nonlocal count
        with lock:
            count += 1
            number = count
        if number == after + 1:
            _thread.interrupt_main()
        return [60.0] if number > after else echo(request)

    return script


def test_an_interrupt_is_raised_and_the_next_run_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        complete(ROWS, model=chat_model(interrupting(8), parallel=1))
    partial = last_run().frame()
    assert sorted(partial["finish_reason"].value_counts().items()) == [
        ("cancelled", 12),
        ("error", 0),
        ("length", 0),
        ("skipped", 0),
        ("stop", 8),
    ]
    assert partial["error"].isna().all()
    model = chat_model()
    out = complete(ROWS, model=model)
    assert len(engine_of(model).requests) == 12
    assert list(out["completion"]) == ROWS
    assert out["source"].value_counts()["cache"] == 8


def test_an_interrupt_leaves_nothing_running() -> None:
    model = chat_model(interrupting(3), parallel=2)
    with pytest.raises(KeyboardInterrupt):
        complete(ROWS, model=model)
    load = model.engine.load()
    assert (load.running, load.waiting) == (0, 0)
    assert last_run().done


KILLED = """
    import os, signal, sys, time
    sys.path.insert(0, {tests!r})
    from support.frames import chat_model, last_text
    from support.fake_engine import echo
    from nbinfer.frames import cache, complete
    count = 0
    def script(request):
        global count
        while cache.info().entries < count:
            time.sleep(0.001)
        if count == {kept}:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return echo(request)
    complete([f"row {{i}}" for i in range(20)], model=chat_model(script, parallel=1))
"""


@pytest.mark.parametrize("kept", [0, 7, 19])
def test_after_kill_9_only_the_uncommitted_rows_are_computed(kept: int) -> None:
    tests = str(Path(__file__).parents[1])
    program = textwrap.dedent(KILLED.format(tests=tests, kept=kept))
    killed = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert cache.info().entries == kept
    model = chat_model()
    out = complete(ROWS, model=model)
    assert len(engine_of(model).requests) == 20 - kept
    pd.testing.assert_frame_equal(
        out.drop(columns=["source", "seconds"]),
        complete(ROWS, cache=False, model=chat_model()).drop(columns=["source", "seconds"]),
    )


def test_two_processes_may_write_at_once() -> None:
    tests = str(Path(__file__).parents[1])
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {tests!r})
        from support.frames import chat_model
        from nbinfer.frames import complete
        out = complete([f"{{sys.argv[1]}} {{i}}" for i in range(100)], model=chat_model())
        assert out["error"].isna().all()
    """)
    jobs = [subprocess.Popen([sys.executable, "-c", program, name]) for name in ("one", "two")]
    assert [job.wait(120) for job in jobs] == [0, 0]
    assert cache.info().entries == 200


# -- trouble ------------------------------------------------------------------------------------------------


def fill_disk(journal: Journal) -> None:
    """Make SQLite answer as on a full disk."""
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages}")


def test_a_full_disk_is_a_clear_error_and_costs_no_row() -> None:
    big = "w" * 20_000
    fill_disk(open_journal())
    with pytest.raises(JournalError, match="full") as caught:
        complete(ROWS, model=chat_model([big], parallel=1))
    assert str(caught.value).count("\n") <= 4
    assert "nb.cache.clear()" in str(caught.value)
    kept = last_run().frame()["completion"].notna().sum()
    assert kept >= 1
    # The same kernel goes on from memory; the file is whole.
    open_journal()._db.execute("PRAGMA max_page_count=100000")
    model = chat_model([big])
    out = complete(ROWS, model=model)
    assert out["error"].isna().all()
    assert len(engine_of(model).requests) == 20 - kept
    assert open_journal()._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_cache_false_works_on_a_full_disk() -> None:
    fill_disk(open_journal())
    assert complete(["a"], model=chat_model(["w" * 20_000]), cache=False)["error"].isna().all()


def test_without_a_writable_folder_a_warning_says_so_and_memory_serves(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with pytest.warns(JournalWarning, match="kept in memory until the kernel ends"):
        complete(["a"], model=chat_model())
    model = chat_model()
    assert complete(["a"], model=model)["source"][0] == "cache"
    assert engine_of(model).requests == []
    assert cache.info().path is None


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder with one result, that this process may read and not write."""
    home = Path(tempfile.mkdtemp())
    home.chmod(0o755)
    monkeypatch.setenv("NBINFER_CACHE", str(home / "cache"))
    complete(["a"], model=chat_model())
    journals.close_all()
    inside = [home, *home.rglob("*")]
    for path in inside:
        path.chmod(0o555 if path.is_dir() else 0o444)
    # Root may write everywhere: become somebody else for the test.
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield home
    os.seteuid(user)
    journals.close_all()
    for path in inside:
        path.chmod(0o755)
    shutil.rmtree(home)


def test_a_read_only_home_gets_a_warning_and_its_answers(nobody: Path) -> None:
    with pytest.warns(JournalWarning, match="kept in memory until the kernel ends"):
        out = complete(["a", "b"], model=chat_model())
    assert list(out["completion"]) == ["a", "b"]
    assert set(complete(["a", "b"], model=chat_model())["source"]) == {"cache"}
    assert not list(nobody.rglob("*.damaged*"))


def test_a_damaged_file_is_put_aside_and_results_are_kept_again() -> None:
    path = journals.journal_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"this is not a database " * 100)
    with pytest.warns(JournalWarning, match="damaged"):
        complete(["a"], model=chat_model())
    assert complete(["a"], model=chat_model())["source"][0] == "cache"
    assert len(list(path.parent.glob("*.damaged-*"))) == 1


def test_an_engine_that_names_no_weights_is_not_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    model = chat_model()
    engine_of(model)._info = replace(model.info, digest="")
    for _ in range(2):
        assert complete(["a"], model=model)["source"][0] == "run"
    assert "does not say which weights" in capsys.readouterr().err


# -- size ---------------------------------------------------------------------------------------------------


def put(journal: Journal, *names: str, size: int = 10) -> None:
    for name in names:
        journal.put(name.encode(), Record("x" * size), CODEC, op="complete", model="m")


def test_info_and_clear() -> None:
    complete(["a", "b"], model=chat_model())
    embed(["a"], model=embedding_model(model="e"))
    info = cache.info()
    assert (info.entries, info.by_op) == (3, {"complete": 2, "embed": 1})
    assert info.path is not None
    assert info.path.endswith("frames-1.sqlite")
    assert "3 results (complete 2, embed 1)" in repr(cache)
    assert cache.clear(op="embed") == 1
    assert cache.clear(model="nobody") == 0
    assert cache.clear() == 2
    assert cache.info().entries == 0


def test_beyond_its_size_the_longest_unused_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    today = time.time()
    monkeypatch.setattr(time, "time", lambda: today)
    journal = Journal(None, limit=2_000_000)
    put(journal, *(f"old {i}" for i in range(400)), size=4000)
    today += 86_400 * 3
    used = [f"old {i}".encode() for i in range(50)]
    assert len(journal.get_many(used, CODEC)) == 50
    put(journal, *(f"new {i}" for i in range(256)), size=4000)
    assert journal.info().bytes <= 2_100_000
    assert len(journal.get_many(used, CODEC)) == 50
    assert len(journal.get_many([f"old {i}".encode() for i in range(50, 400)], CODEC)) < 200
    journal.close()


def test_the_size_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBINFER_JOURNAL_BYTES", "12345")
    assert cache.info().limit == 12345
    for wrong in ("lots", "0", "-5"):
        monkeypatch.setenv("NBINFER_JOURNAL_BYTES", wrong)
        with pytest.raises(ConfigError, match="number of bytes"):
            cache.info()


def test_clearing_gives_the_space_back(folder: Path) -> None:
    del folder
    journal = open_journal()
    put(journal, *(f"k{i}" for i in range(300)), size=10_000)
    assert journal.path is not None
    journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    before = journal.path.stat().st_size
    journal.clear()
    assert journal.path.stat().st_size < before / 10


def test_a_row_is_committed_when_it_is_done_not_when_the_run_is() -> None:
    gate = threading.Event()
    model = chat_model(lambda r: [gate, *echo(r)] if "slow" in last_text(r) else echo(r), parallel=2)
    run = submit(["quick", "slow"], model=model)
    while run.progress.done < 1:
        pass
    path = open_journal().path
    deadline = time.monotonic() + 30
    rows: list[Any] = []
    while not rows and time.monotonic() < deadline:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as other:
            rows = other.execute("SELECT data FROM entries").fetchall()
        other.close()
    assert rows == [(b"quick",)]
    gate.set()
    run.wait(30)
