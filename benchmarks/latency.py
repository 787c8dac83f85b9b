"""The wait for an answer: ``nb.bench`` at several numbers of requests at once, and a cell beside a batch.

    python benchmarks/latency.py                                   # 0.5B q8_0, seconds
    python benchmarks/latency.py --model q4_0 --parallel 1 4 16 --runs 5

The second table is the wait of somebody who types a cell while a long batch runs on the same model: seconds
to the first token and seconds a token, beside the same question to an idle engine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any

from _support import about, add_common_flags, endless, model_path, show, words

import nbinfer as nb
from nbinfer.contract.results import Delta

if TYPE_CHECKING:
    from collections.abc import Sequence

SHOWN = (
    "parallel",
    "first_token_seconds",
    "prompt_tokens_per_second",
    "tokens_per_second",
    "token_p50_seconds",
    "token_p95_seconds",
    "token_p99_seconds",
)


def ask(model: nb.Model, seed: int, new: int) -> tuple[float, float]:
    """Return the seconds to the first token, and the median of those between two."""
    prompt = f"{seed} " + " ".join(words(24, seed=seed))
    began = time.perf_counter()
    events = model.stream(prompt, raw=True, max_tokens=new, logit_bias=endless(model)).events()
    arrivals = [time.perf_counter() for event in events if isinstance(event, Delta)]
    if not arrivals:
        raise SystemExit("the model wrote nothing.")
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    return arrivals[0] - began, statistics.median(gaps) if gaps else 0.0


def beside_a_batch(model: nb.Model, rows: int, new: int, questions: int) -> list[Sequence[Any]]:
    """Ask while the engine is idle, then while it has a batch; the batch is stopped afterwards."""
    idle = [ask(model, 10_000 + i, new) for i in range(questions)]
    batch = [
        model.submit(
            model.request(
                f"{i} " + " ".join(words(60, seed=i)), raw=True, max_tokens=4 * new, priority="batch"
            )
        )
        for i in range(rows)
    ]
    busy = []
    for i in range(questions):
        time.sleep(0.2)
        busy.append(ask(model, 20_000 + i, new))
    left = sum(not stream.done for stream in batch)
    for stream in batch:
        stream.cancel()
    return [
        (
            where,
            statistics.median(first for first, _ in times),
            max(first for first, _ in times),
            statistics.median(gap for _, gap in times),
            rest,
        )
        for where, times, rest in (("idle", idle, None), (f"beside {rows} rows", busy, left))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the wait for an answer.")
    add_common_flags(parser, model="q8_0")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=40, help="rows of the batch beside the cell")
    parser.add_argument("--questions", type=int, default=3)
    options = parser.parse_args()
    needed = max(options.parallel) * (options.prompt + options.new)
    with nb.load(
        model_path(options.model), threads=options.threads, context_size=max(4096, needed), force=True
    ) as model:
        frame = nb.bench(
            model,
            prompt_tokens=options.prompt,
            new_tokens=options.new,
            parallel=tuple(options.parallel),
            runs=options.runs,
        )
        median = frame[list(SHOWN)].groupby("parallel").median().reset_index()
        peak = frame["peak_memory_bytes"].max() / 2**20
        show(
            f"{options.model}: {options.prompt} + {options.new} tokens, {options.threads} thread(s), "
            f"median of {options.runs} runs",
            ("at once", "first token s", "prompt tok/s", "tok/s", "token p50 s", "p95 s", "p99 s"),
            [(int(row[0]), *row[1:]) for row in median.itertuples(index=False)],
            notes=(f"load {model.load_seconds:.2f} s, peak resident memory {peak:,.0f} MiB", about()),
            target=options.json,
        )
        show(
            f"{options.model}: a cell of 25 words, {options.new} tokens",
            ("engine", "first token s, median", "worst", "s per token", "rows left"),
            beside_a_batch(model, options.rows, options.new, options.questions),
            target=options.json,
        )


if __name__ == "__main__":
    main()
