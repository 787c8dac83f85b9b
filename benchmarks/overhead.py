"""What streaming through nbinfer costs: its tokens per second against a bare llama_decode loop.

    python benchmarks/overhead.py                       # one thread, q8_0, 7 rounds of 96 tokens
    python benchmarks/overhead.py --type q4_0 --threads 2 --rounds 11

Both sides run in one process, on the same 0.5B model (random weights), with the same threads, context and
batch sizes, and take the most likely token. The bare loop is the least that Python can do: llama_decode, a
view of the logits, argmax; it makes no text. The other side is what a user does: it iterates ``nb.stream``,
text and all.

The sides take turns, and who begins alternates, so that a busy machine slows both; the ratio is the median
over pairs. Speed counts from the first token to the last: the prompt is not part of it. The processor time of
a token, over all threads of the process, is shown too: it hardly moves when other programs run.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import nbinfer as nb
from nbinfer.contract.results import Delta
from nbinfer.engines.llamacpp.library import library
from nbinfer.engines.llamacpp.weights import Weights

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from perf_model import TYPES, perf_model

PROMPT = "Once upon a time there was a model that wrote noise, quickly."


@dataclass(frozen=True, slots=True)
class Pace:
    """What the tokens after the first one took: seconds by the clock, and of processor time."""

    tokens: int
    seconds: float
    processor_seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def cost(self) -> float:
        """Processor time of a token, in milliseconds."""
        return 1000 * self.processor_seconds / self.tokens


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def pace(tokens: int, first: tuple[float, float], last: tuple[float, float]) -> Pace:
    return Pace(tokens, last[0] - first[0], last[1] - first[1])


class BareLoop:
    """llama_decode and argmax, nothing else."""

    def __init__(
        self, path: Path, *, threads: int, context: int, batch: int, micro_batch: int, flash: bool
    ) -> None:
        self._lib: Any = library()
        self.weights = Weights(path)
        params = self._lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = batch
        params.n_ubatch = micro_batch
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        # The same attention on both sides: on a CPU nbinfer does without llama.cpp's default.
        params.flash_attn_type = int(flash)
        self._context = self._lib.llama_init_from_model(self.weights.pointer, params)
        self._memory = self._lib.llama_get_memory(self._context)

    def run(self, prompt: str, n_tokens: int) -> tuple[str, Pace]:
        """Return the text, made after the clock stopped, and the pace."""
        lib, context = self._lib, self._context
        lib.llama_memory_clear(self._memory, True)
        ids = self.weights.tokenize(prompt, special=True, add_special=True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        made: list[int] = []
        count, first = len(ids), now()
        while True:
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, count)) != 0:
                raise SystemExit("llama_decode failed.")
            address: Any = ctypes.cast(lib.llama_get_logits_ith(context, -1), ctypes.c_void_p).value
            view: Any = (ctypes.c_float * self.weights.n_vocab).from_address(address)
            token = int(np.frombuffer(view, np.float32).argmax())
            if not made:
                first = now()
                tokens, count = (ctypes.c_int32 * 1)(), 1
            if token in self.weights.end_tokens:
                break
            made.append(token)
            if len(made) == n_tokens:
                break
            tokens[0] = token
        measured = pace(len(made) - 1, first, now())
        return b"".join(self.weights.piece(token) for token in made).decode("utf-8", "replace"), measured

    def close(self) -> None:
        """Free the context and the model."""
        self._lib.llama_free(self._context)
        self.weights.close()


def streamed(model: nb.Model, prompt: str, n_tokens: int) -> tuple[str, Pace]:
    """Return the text, and its pace as it reached this loop."""
    pieces: list[str] = []
    tokens: list[int] = []
    first = last = now()
    for event in nb.stream(prompt, model=model, raw=True, max_tokens=n_tokens).events():
        if isinstance(event, Delta):
            last = now()
            if not tokens:
                first = last
            pieces.append(event.text)
            tokens.append(event.n_tokens)
    return "".join(pieces), pace(sum(tokens[1:]), first, last)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what streaming through nbinfer costs.")
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    batch, micro_batch = min(options.context, 2048), min(options.context, 512)

    path = perf_model(options.type)
    model = nb.load(
        path,
        context_size=options.context,
        threads=options.threads,
        batch_size=batch,
        micro_batch=micro_batch,
        force=True,
    )
    bare = BareLoop(
        path,
        threads=options.threads,
        context=options.context,
        batch=batch,
        micro_batch=micro_batch,
        flash=bool(model.info.effective["flash_attention"]),
    )
    pairs = []
    for i in range(-1, options.rounds):
        if i % 2 == 0:
            text, bare_pace = bare.run(options.prompt, options.tokens)
        streamed_text, stream_pace = streamed(model, options.prompt, options.tokens)
        if i % 2 == 1:
            text, bare_pace = bare.run(options.prompt, options.tokens)
        if text != streamed_text:
            raise SystemExit(f"the two sides wrote different texts:\n{text!r}\n{streamed_text!r}")
        # The first pair warms both up.
        if i >= 0:
            pairs.append((bare_pace, stream_pace))
    model.unload()
    bare.close()
    report(pairs, f"0.5B {options.type}, {options.threads} thread(s), {options.tokens} tokens a run")


def report(pairs: list[tuple[Pace, Pace]], title: str) -> None:
    table = Table(title=title)
    headings = (
        "round",
        "bare tok/s",
        "stream tok/s",
        "ratio",
        "bare CPU ms/tok",
        "stream CPU ms/tok",
        "ratio",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    rows = [
        (bare.rate, stream.rate, stream.rate / bare.rate, bare.cost, stream.cost, stream.cost / bare.cost)
        for bare, stream in pairs
    ]
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    for name, row in [*((str(i), row) for i, row in enumerate(rows, 1)), ("median", medians)]:
        if name == "median":
            table.add_section()
        shown = (
            f"{value:.3f}" if "ratio" in heading else f"{value:.2f}"
            for heading, value in zip(headings[1:], row, strict=True)
        )
        table.add_row(name, *shown, style="bold" if name == "median" else None)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
