"""Many prompts at once: nbinfer against llama-cpp-python's plain loop, and against what the cores can do.

    python benchmarks/batch.py                                 # 24 rows behind a shared 200-token instruction
    python benchmarks/batch.py --new 24 64 --rounds 3
    python benchmarks/batch.py --rows 16 --prefix 0 --row 220  # nothing in common
    python benchmarks/batch.py --llama-server build/bin/llama-server

Each side answers the same rows greedily: ``nb.complete`` on a list, ``Llama(...)`` called in a loop (it keeps
the last prompt, so the instruction is computed once there too), and, where a binary is given,
``llama-server`` with 8 slots and as many clients. The cost is CPU seconds of the process that works. The
sides take turns, and every round has rows of its own, of which no side can know anything.

The bound is what the cores need without any scheduling: the instruction once and every row's own tokens at
the best prompt rate, and every new token at the best rate of a batch, both measured here with bare
``llama_decode`` calls.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from _support import (
    Cost,
    about,
    add_common_flags,
    bare_context,
    measured,
    model_path,
    peer_llama,
    show,
    text_of_length,
)

import nbinfer as nb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Side = Callable[[list[str], int], tuple[list[str], Cost]]

SLOTS = 8
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32)
PIECES = (64, 128, 256, 512)


def make_rows(model: nb.Model, options: argparse.Namespace, seed: int) -> tuple[list[str], int, int]:
    """Return prompts, and how many tokens their common beginning and one row's own part have."""

    def count(text: str) -> int:
        return model.engine.render(model.request(text, raw=True))[1] if text else 0

    prefix = text_of_length(options.prefix, count, seed=seed)
    n_prefix = count(prefix)
    rows = []
    for i in range(options.rows):
        head = f"{prefix}\n{i}" if prefix else f"{i}"
        length = n_prefix + options.row

        def count_with(text: str, head: str = head) -> int:
            return count(f"{head} {text}")

        rows.append(f"{head} {text_of_length(length, count_with, seed=seed + 1 + i)}")
    own = round(statistics.mean(count(row) for row in rows)) - n_prefix
    return rows, n_prefix, own


def ours(model: nb.Model) -> Side:
    def side(rows: list[str], new: int) -> tuple[list[str], Cost]:
        with measured() as cost:
            out = nb.complete(rows, model=model, raw=True, max_tokens=new, cache=False, progress=False)
        failed = out["error"].notna()
        if failed.any():
            raise SystemExit(f"{int(failed.sum())} rows failed: {out['error'][failed].iloc[0]}")
        return list(out["completion"]), cost

    return side


def plain_loop(llama: Any) -> Side:
    def side(rows: list[str], new: int) -> tuple[list[str], Cost]:
        llama.reset()
        with measured() as cost:
            answers = [llama(row, max_tokens=new, temperature=0.0) for row in rows]
        return [answer["choices"][0]["text"] for answer in answers], cost

    return side


@contextmanager
def server(binary: Path, path: Path, *, threads: int, context: int) -> Iterator[Side]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(binary), "-m", str(path), "-c", str(context), "-np", str(SLOTS), "--kv-unified",
        "-t", str(threads), "-tb", str(threads), "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def ask(row: str, new: int) -> str:
        body = {"prompt": row, "n_predict": new, "temperature": 0, "cache_prompt": True}
        request = urllib.request.Request(  # noqa: S310 - a server that was started above
            f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=3600) as answer:  # noqa: S310
            return str(json.load(answer)["content"])

    def cpu() -> float:
        times = psutil.Process(process.pid).cpu_times()
        return float(times.user + times.system)

    def side(rows: list[str], new: int) -> tuple[list[str], Cost]:
        with measured(cpu) as cost, ThreadPoolExecutor(SLOTS) as clients:
            answers = list(clients.map(lambda row: ask(row, new), rows))
        return answers, cost

    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{binary} ended at once with code {process.returncode}.")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310
                    break
            except OSError:
                time.sleep(0.2)
        yield side
    finally:
        process.terminate()
        process.wait(30)


class Bound:
    """The best rates of bare decode calls on these cores, in tokens per CPU second."""

    def __init__(self, path: Path, *, threads: int, context: int) -> None:
        self._weights, self._context = bare_context(
            path, threads=threads, context=context, sequences=max(BATCHES)
        )
        self._rng = np.random.default_rng(0)
        self.prompt_rates: dict[int, float] = {}
        self.batch_rates: dict[int, float] = {}

    def measure(self, held: int, *, repeats: int = 3) -> None:
        """Measure both, batches behind ``held`` tokens that all sequences share."""
        context = self._context
        for n in PIECES:
            if n < context.size:
                context.clear()
                self._best(self.prompt_rates, n, n, partial(self._decode, [(0, n, 0)]))
        room = (context.size - held) // (repeats + 1)
        for n in BATCHES:
            if n > room:
                continue
            context.clear()
            self._decode([(0, held, 0)])
            for sequence in range(1, n):
                context.copy(0, sequence, held)
            for i in range(repeats):
                step = [(sequence, 1, held + i) for sequence in range(n)]
                self._best(self.batch_rates, n, n, partial(self._decode, step))

    def _best(self, rates: dict[int, float], key: int, tokens: int, work: Callable[[], None]) -> None:
        with measured() as cost:
            work()
        rates[key] = max(rates.get(key, 0.0), tokens / cost.cpu)

    def _decode(self, parts: list[tuple[int, int, int]]) -> None:
        for sequence, n, position in parts:
            tokens = self._rng.integers(0, self._weights.n_vocab // 2, n).astype(np.int32)
            self._context.add(sequence, tokens, position, output=True)
        if self._context.decode() != 0:
            raise SystemExit("the context is too small for the bound's batches: raise --context.")

    def seconds(self, prompt_tokens: int, new_tokens: int) -> float:
        """CPU seconds for so many tokens at the best rates seen."""
        return prompt_tokens / max(self.prompt_rates.values()) + new_tokens / max(self.batch_rates.values())

    def words(self) -> str:
        """The rates, for the table's foot."""
        prompt = ", ".join(f"{n}: {rate:.0f}" for n, rate in self.prompt_rates.items())
        batch = ", ".join(f"{n}: {rate:.0f}" for n, rate in self.batch_rates.items())
        return f"bare decode, tokens per CPU second: prompt pieces of {prompt}; batches of {batch}"

    def close(self) -> None:
        """Free the context and the model."""
        self._context.close()
        self._weights.close()


def same(text: str, other: str) -> bool:
    """Whether two sides wrote the same; they replace, or leave out, bytes that are no character."""
    return text.replace("\ufffd", "") == other.replace("\ufffd", "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure many prompts at once.")
    add_common_flags(parser, model="q4_0")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--prefix", type=int, default=200, help="tokens that all rows begin with")
    parser.add_argument("--row", type=int, default=20, help="tokens of a row's own")
    parser.add_argument("--new", type=int, nargs="+", default=[24], help="tokens to generate per row")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--parallel", type=int, help="rows at once (default: nbinfer's own)")
    parser.add_argument("--llama-server", metavar="BINARY", help="also measure this llama-server")
    options = parser.parse_args()

    path = model_path(options.model)
    context = options.context
    with ExitStack() as stack:
        model = stack.enter_context(
            nb.load(
                path, threads=options.threads, context_size=context, parallel=options.parallel, force=True
            )
        )
        llama = stack.enter_context(
            peer_llama(path, n_ctx=context, n_threads=options.threads, n_threads_batch=options.threads)
        )
        bound = Bound(path, threads=options.threads, context=model.info.context_size)
        stack.callback(bound.close)
        sides = {"nbinfer, nb.complete": ours(model), "llama-cpp-python, a loop": plain_loop(llama)}
        if options.llama_server:
            run_server = server(options.llama_server, path, threads=options.threads, context=context)
            sides[f"llama-server, {SLOTS} slots"] = stack.enter_context(run_server)
        for side in sides.values():
            side(["Once upon a time", "There was a model"], 2)  # warm-up
        for new in options.new:
            compare(options, model, sides, bound, new)


def compare(
    options: argparse.Namespace, model: nb.Model, sides: dict[str, Side], bound: Bound, new: int
) -> None:
    """Run every side in turns and print the table of one number of new tokens."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    first = next(iter(sides))
    equal = dict.fromkeys(sides, 0)
    for i in range(options.rounds):
        rows, n_prefix, own = make_rows(model, options, seed=1000 * (1 + i) + new)
        bound.measure(n_prefix + own)
        texts: dict[str, list[str]] = {}
        for name in list(sides) if i % 2 == 0 else reversed(sides):
            texts[name], cost = sides[name](rows, new)
            costs[name].append(cost)
        for name in sides:
            equal[name] += sum(same(a, b) for a, b in zip(texts[first], texts[name], strict=True))
    n_rows = options.rows
    least = bound.seconds(n_prefix + own * n_rows, new * n_rows)
    ours_cpu = [cost.cpu for cost in costs[first]]
    table: list[tuple[Any, ...]] = []
    for name in sides:
        cpu = [cost.cpu for cost in costs[name]]
        table.append(
            (
                name,
                statistics.median(cpu),
                statistics.median(cost.wall for cost in costs[name]),
                statistics.median(cpu) / least,
                statistics.median(a / b for a, b in zip(ours_cpu, cpu, strict=True)),
                f"{equal[name]}/{n_rows * options.rounds}",
            )
        )
    table.append(("bound", least, None, 1.0, statistics.median(ours_cpu) / least, None))
    show(
        f"{options.model}: {n_rows} rows x ({n_prefix} shared + {own} own + {new} new tokens), "
        f"{options.threads} thread(s), {model.info.parallel} slots",
        ("side", "CPU s", "wall s", "x bound", "nbinfer / it", "same text"),
        table,
        notes=(bound.words(), about()),
        target=options.json,
    )


if __name__ == "__main__":
    main()
