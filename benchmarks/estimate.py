"""How long an estimate takes: by formula, and asked of llama.cpp.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --models qwen3-0.6b gemma-3-4b --rounds 20

Models are headers of published shapes with a tokenizer of the full size and no weights. Milliseconds on the
clock, the median of several rounds:

first     reading the header, and the first estimate by formula
formula   another context by formula, the header known
split     the same with another number of layers on the GPU, of which nothing is known yet
warm      llama.cpp asked in a running child process, with another context than before
other     the same after another model: the child loads this one's header
cold      the same with a new child process: it starts, loads llama.cpp and checks itself first
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from nbinfer.gguf import read_header
from nbinfer.memory import estimate
from nbinfer.memory.probe import shared_probe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import synthetic

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.gguf import Header

MODELS = (
    "llama-3.1-8b",
    "qwen3-0.6b",
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "gemma-3-4b",
    "deepseek-v2-lite",
    "qwen3-next-80b-a3b",
    "bge-m3",
)
OTHER = "llama-3.2-1b"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(synthetic.ALL), default=MODELS)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    table = Table("model", "vocabulary", "first", "formula", "split", "warm", "other", "cold")
    with tempfile.TemporaryDirectory() as folder:
        other = read_header(synthetic.write(synthetic.ALL[OTHER](), Path(folder, "other.gguf")))
        for name in args.models:
            path = synthetic.write(synthetic.ALL[name](), Path(folder, f"{name}.gguf"), tokenizer=True)
            times = measured(path, other, args.rounds)
            table.add_row(name, f"{read_header(path).n_vocab:,}", *(f"{t:.1f}" for t in times))
            path.unlink()
    Console().print(table)


def measured(path: Path, other: Header, rounds: int) -> list[float]:
    """Milliseconds of each kind of estimate."""
    header = read_header(path)
    sizes = itertools.cycle((2048, 4096, 8192, 16384))

    # Half of them and some more or fewer, more often than anything is kept.
    layers = itertools.cycle(range((header.n_layers or 0) // 4, 3 * (header.n_layers or 0) // 4))

    def ask(found: Header | Path, *, exact: bool, gpu_layers: int | None = None) -> Any:
        return estimate(found, context_size=next(sizes), gpu_layers=gpu_layers, gpus=["24GiB"], exact=exact)

    def ask_other() -> None:
        ask(other, exact=True)

    return [
        median(lambda: ask(path, exact=False), rounds),
        median(lambda: ask(header, exact=False), rounds),
        median(lambda: ask(header, exact=False, gpu_layers=next(layers)), rounds),
        median(lambda: ask(header, exact=True), rounds, before=lambda: ask(header, exact=True)),
        median(lambda: ask(header, exact=True), rounds, before=ask_other),
        median(lambda: ask(header, exact=True), rounds, before=lambda: shared_probe().close()),
    ]


def median(work: Callable[[], Any], rounds: int, before: Callable[[], Any] = lambda: None) -> float:
    """The median time of ``work`` in milliseconds, that of ``before`` left out."""
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    main()
