"""What the benchmarks share: models by name, costs, peers under the same conditions, tables."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from rich.console import Console
from rich.table import Table

from nbinfer.engines.llamacpp.library import library, may_rearrange_weights, uses_amx
from nbinfer.models.demo import demo_embed_path, demo_path
from nbinfer.processor import flags

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from perf_model import TYPES, perf_model

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from perf_model import WeightType

    from nbinfer.session import Model


def model_path(name: str) -> Path:
    """Return the file of ``q4_0``, ``q8_0`` or ``f16`` (0.5B, random weights), a demo model's, or a path."""
    if name in TYPES:
        return perf_model(cast("WeightType", name))
    named = {"demo": demo_path, "demo-embed": demo_embed_path, "demo-embed-q8_0": _demo_embed_q8_0}
    return named[name]() if name in named else Path(name)


def _demo_embed_q8_0() -> Path:
    """Return the embedding model as llama.cpp itself quantises it; made once."""
    source = demo_embed_path()
    path = source.with_name(source.name.replace("f16", "q8_0"))
    if not path.exists():
        may_rearrange_weights()  # before llama.cpp looks for itself
        lib = library()
        params = lib.llama_model_quantize_default_params()
        params.ftype = lib.LLAMA_FTYPE_MOSTLY_Q8_0
        half = path.with_suffix(".half")
        if lib.llama_model_quantize(str(source).encode(), str(half).encode(), ctypes.byref(params)) != 0:
            raise SystemExit(f"llama.cpp could not quantise {source}.")
        half.replace(path)
    return path


def add_common_flags(parser: argparse.ArgumentParser, *, model: str) -> None:
    parser.add_argument(
        "--model", default=model, help="q4_0, q8_0, f16, demo, demo-embed, demo-embed-q8_0 or a GGUF file"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the table here")


@dataclass
class Cost:
    """Seconds on the clock, and CPU seconds over all threads of the process that worked."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


@contextmanager
def measured(cpu_clock: Callable[[], float] = time.process_time) -> Iterator[Cost]:
    """Yield a cost that is filled in when the block ends."""
    cost, wall, cpu = Cost(), time.perf_counter(), cpu_clock()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, cpu_clock() - cpu


@contextmanager
def peer_llama(path: Path, **options: Any) -> Iterator[Any]:
    """Yield llama-cpp-python's ``Llama`` with the same weight layout as nbinfer chooses on this machine.

    ``Llama`` has no option for that, and some builds crash with its own choice
    (see :func:`nbinfer.engines.llamacpp.library.may_rearrange_weights`).
    """
    may_rearrange = may_rearrange_weights()  # in any case before llama.cpp looks for itself
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def same_layout() -> Any:
        params = defaults()
        params.use_extra_bufts = may_rearrange
        return params

    with mock.patch("llama_cpp.llama_cpp.llama_model_default_params", same_layout):
        llama = llama_cpp.Llama(str(path), verbose=False, **options)
    try:
        yield llama
    finally:
        llama.close()


def endless(model: Model) -> dict[int, float]:
    """Return a bias that keeps the model from ending its answer."""
    return dict.fromkeys(getattr(model.engine, "end_tokens", ()), -100.0)


def words(n: int, *, seed: int = 0) -> list[str]:
    """Return ``n`` words, the same ones for the same seed."""
    import random

    rng = random.Random(seed)
    stems = "report the weather every price in a small town near old river stone table green light"
    return rng.choices(stems.split(), k=n)


def text_of_length(n_tokens: int, count: Callable[[str], int], *, seed: int = 0) -> str:
    """Return words of ``n_tokens`` tokens, or the nearest number below that whole words can make."""
    chosen = words(n_tokens + 1, seed=seed)
    low, high = 0, len(chosen)
    while low < high:
        middle = (low + high + 1) // 2
        if count(" ".join(chosen[:middle])) <= n_tokens:
            low = middle
        else:
            high = middle - 1
    return " ".join(chosen[:low])


def about(*peers: str) -> str:
    """Return what a table's reader needs to know: versions, machine, load, weight layout."""
    found = []
    for name in ("nbinfer", "llama-cpp-python", *peers):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    layout = "rearranged" if may_rearrange_weights() else "as in the file"
    if uses_amx():
        layout = "in AMX's tiles where they have a type for it, else rearranged,"
    return (
        f"{', '.join(found)}; Python {platform.python_version()}; {_processor()}, "
        f"{os.cpu_count()} CPUs{load}; weights {layout} on every side"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines[:30] if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    has = [name for name in ("avx2", "avx512f", "amx_int8") if name in flags()]
    return f"{found.get('model name', platform.machine())} ({' '.join(has)})"


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    notes: Iterable[str] = (),
    target: Path | None = None,
) -> None:
    """Print a table, and write it as JSON where that was asked for.

    Numbers are rounded for reading: below 10 to three decimals, else to one.
    """
    kept = [list(row) for row in rows]
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in kept:
        table.add_row(*(_shown(value) for value in row))
    lines = [*notes]
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    if target is not None:
        data = {
            "title": title,
            "rows": [dict(zip(columns, row, strict=True)) for row in kept],
            "notes": lines,
        }
        tables = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
        target.write_text(json.dumps([*tables, data], indent=1) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def bare_context(path: Path, *, threads: int, context: int, sequences: int) -> Any:
    """Return weights and a context of nbinfer's engine without its scheduler, for bounds."""
    from nbinfer.engines.llamacpp.context import Context, ContextSettings
    from nbinfer.engines.llamacpp.weights import Weights

    library()
    weights = Weights(path)
    settings = ContextSettings(context_size=context, threads=threads)
    return weights, Context(weights, settings, parallel=sequences)
