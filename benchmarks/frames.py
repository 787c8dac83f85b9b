"""What a frame costs over its model, and what survives a kill.

    python benchmarks/frames.py                          # all three, about 5 minutes on two cores
    python benchmarks/frames.py overhead --rows 2000
    python benchmarks/frames.py known --rows 1000000
    python benchmarks/frames.py kills --rows 2000 --times 20 --where kernel sidecar --how kill interrupt
    python benchmarks/frames.py kills --batched                    # without exact=True

overhead: the same requests through the bare engine (all submitted, then awaited) and through ``nb.complete``
with its journal, in turns, on the demo chat model; what a row costs more is the median difference of
processor time. known: rows that are all duplicates of a few, then rows that are all in the journal; rows per
second and the most memory. kills: a job in a process of its own, with the model in it or in the sidecar, is
killed with SIGKILL or interrupted at a random moment and run again; committed rows that are computed again,
and whether the frame equals an undisturbed one (with ``exact=True``; ``--batched`` is without: a batch of
another shape may flip a near tie).
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_WORDS = ("lamp", "soup", "parcel", "river", "engine", "garden", "window", "letter")


def demo_rows(count: int) -> list[str]:
    return [f"What is {i % 97} plus {i // 97}?" for i in range(count)]


def loaded(*, exact: bool = False, where: str = "kernel") -> Any:
    import nbinfer as nb

    return nb.load("demo", threads=1, where=where, exact=exact)


def overhead(table: Table, rows: int) -> None:
    import nbinfer as nb

    model, texts = loaded(), demo_rows(rows)

    def bare() -> None:
        streams = [
            model.submit(model.request(text, max_tokens=12, temperature=0, priority="batch"))
            for text in sorted(texts)
        ]
        for stream in streams:
            stream.result()

    def frame() -> None:
        nb.complete(texts, model=model, max_tokens=12, cache="refresh", progress=False)

    bare()
    extra = []
    for _ in range(5):
        took = {}
        for name, run in (("bare", bare), ("frame", frame)):
            began = time.process_time()
            run()
            took[name] = time.process_time() - began
        extra.append((took["frame"] - took["bare"]) / rows)
    per_row = statistics.median(extra) * 1000
    table.add_row(
        "overhead per computed row", f"{per_row:.3f} ms CPU", f"{rows:,} rows, journal on", "≤ 1 ms"
    )


def known(table: Table, rows: int) -> None:
    import pandas as pd

    import nbinfer as nb

    model = loaded()
    few = pd.DataFrame({"t": [demo_rows(1000)[i % 1000] for i in range(rows)]})
    cases = [("duplicates of 1,000 rows", few, 0)]
    unique = min(rows, 20_000)
    made = pd.DataFrame({"t": [f"{_WORDS[i % 8]} number {i}" for i in range(unique)]})
    nb.complete(made, "Say {t}", model=model, max_tokens=1, progress=False)
    cases.append(("rows in the journal", made, 1))
    for name, data, cached in cases:
        template = "Say {t}" if cached else "{t}"
        began, cpu = time.perf_counter(), time.process_time()
        out = nb.complete(data, template, model=model, max_tokens=1 if cached else 12, progress=False)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        if len(out) != len(data):
            raise SystemExit(f"{len(out)} rows came back of {len(data)}")
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        speed = f"{len(data) / wall:,.0f} rows/s ({len(data) / cpu:,.0f} per CPU second)"
        table.add_row(name, speed, f"{len(data):,} rows, at most {most:,.0f} MiB", "≥ 50,000 rows/s")


_JOB = """
import sys
import nbinfer as nb
sys.path.insert(0, {here!r})
from frames import demo_rows, loaded
rows = demo_rows({rows})
nb.complete(rows, model=loaded(exact={exact}, where={where!r}), max_tokens=12, progress=False)
"""


def kills(table: Table, rows: int, times: int, *, where: str, how: str, exact: bool) -> None:
    import nbinfer as nb
    from nbinfer.frames.journal import close_all

    sent = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[how]
    job_text = _JOB.format(here=str(Path(__file__).parent), rows=rows, exact=exact, where=where)
    program = [sys.executable, "-c", job_text]
    model = loaded(exact=exact, where=where)
    expected = list(
        nb.complete(demo_rows(rows), model=model, max_tokens=12, cache=False, progress=False)["completion"]
    )
    dice, stopped, again, equal, differ = random.Random(7), 0, 0, 0, 0
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["NBINFER_CACHE"] = folder
            job = subprocess.Popen(program, stderr=subprocess.DEVNULL)
            stop_at = dice.randint(1, rows - 1)
            while nb.cache.info().entries < stop_at and job.poll() is None:
                time.sleep(0.002)
            if job.poll() is None:
                job.send_signal(sent)
                stopped += 1
            job.wait()
            kept = nb.cache.info().entries
            out = nb.complete(demo_rows(rows), model=model, max_tokens=12, progress=False)
            again += int((out["source"] == "run").sum()) - (rows - kept)
            wrong = sum(a != b for a, b in zip(out["completion"], expected, strict=True))
            equal += not wrong
            differ += wrong
            close_all()
    del os.environ["NBINFER_CACHE"]
    model.unload()
    detail = (
        f"{where}, {how}, {'exact' if exact else 'batched'}: {stopped} of {times} at random rows of {rows:,}"
    )
    table.add_row("committed rows computed again", str(again), detail, "0")
    share = f"{equal} of {times}, {differ} rows of all differ"
    table.add_row("frames equal to an undisturbed one", share, detail, "all" if exact else "-")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="?", choices=["overhead", "known", "kills"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--where", nargs="+", choices=["kernel", "sidecar"], default=["kernel"])
    parser.add_argument("--how", nargs="+", choices=["kill", "interrupt"], default=["kill"])
    parser.add_argument("--batched", action="store_true", help="kills: without exact=True")
    asked = parser.parse_args()
    table = Table("what", "measured", "on", "target")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NBINFER_CACHE"] = folder
        if asked.which in (None, "overhead"):
            overhead(table, asked.rows or 2000)
        if asked.which in (None, "known"):
            known(table, asked.rows or 1_000_000)
        from nbinfer.frames.journal import close_all

        close_all()
    if asked.which in (None, "kills"):
        with tempfile.TemporaryDirectory(prefix="nbi-") as folder:
            # A sidecar of this benchmark's own.
            os.environ["NBINFER_RUNTIME_DIR"] = folder
            for where, how in product(asked.where, asked.how):
                kills(table, asked.rows or 2000, asked.times, where=where, how=how, exact=not asked.batched)
            from nbinfer.sidecar import discovery

            discovery.stop()
    Console().print(table)


if __name__ == "__main__":
    main()
