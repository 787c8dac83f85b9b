"""What streaming through nbinfer costs: its tokens per second against a bare llama_decode loop.

    python benchmarks/overhead.py                       # one thread, q8_0, 7 rounds of 96 tokens
    python benchmarks/overhead.py --type q4_0 --threads 2 --rounds 11

Both sides run in one process, on the same 0.5B model (random weights), with the same threads, context and
batch sizes, and take the most likely token. The bare loop is the least that Python can do: llama_decode, a
view of the logits, argmax; it makes no text. The other side is what a user does: it iterates ``nb.stream``,
text and all.

The sides take turns, and who begins alternates, so that a busy machine slows both; the ratio is the median
over pairs. Speed counts from the first token to the last: the prompt is not part of it.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import nbinfer as nb
from nbinfer.contract.results import Delta, Finished, Result
from nbinfer.engines.llamacpp.library import library
from nbinfer.engines.llamacpp.weights import Weights

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from perf_model import TYPES, perf_model

PROMPT = "Once upon a time there was a model that wrote noise, quickly."


class BareLoop:
    """llama_decode and argmax, nothing else."""

    def __init__(self, path: Path, *, threads: int, context: int, batch: int, micro_batch: int) -> None:
        self._lib: Any = library()
        self.weights = Weights(path)
        params = self._lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = batch
        params.n_ubatch = micro_batch
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = self._lib.llama_init_from_model(self.weights.pointer, params)
        self._memory = self._lib.llama_get_memory(self._context)

    def run(self, prompt: str, n_tokens: int) -> tuple[list[int], float]:
        """Return the tokens and the seconds from the first of them to the last."""
        lib, context = self._lib, self._context
        lib.llama_memory_clear(self._memory, True)
        ids = self.weights.tokenize(prompt, special=True, add_special=True)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        made: list[int] = []
        count, first = len(ids), 0.0
        while True:
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, count)) != 0:
                raise SystemExit("llama_decode failed.")
            address: Any = ctypes.cast(lib.llama_get_logits_ith(context, -1), ctypes.c_void_p).value
            view: Any = (ctypes.c_float * self.weights.n_vocab).from_address(address)
            token = int(np.frombuffer(view, np.float32).argmax())
            if not made:
                first = time.perf_counter()
                tokens, count = (ctypes.c_int32 * 1)(), 1
            if token in self.weights.end_tokens:
                break
            made.append(token)
            if len(made) == n_tokens:
                break
            tokens[0] = token
        return made, time.perf_counter() - first

    def close(self) -> None:
        """Free the context and the model."""
        self._lib.llama_free(self._context)
        self.weights.close()


def streamed(model: nb.Model, prompt: str, n_tokens: int) -> tuple[Result, float]:
    """Return the answer, and its tokens per second as they reached this loop."""
    first, first_tokens, last, tokens = 0.0, 0, 0.0, 0
    result: Result | None = None
    for event in nb.stream(prompt, model=model, raw=True, max_tokens=n_tokens).events():
        if isinstance(event, Delta):
            last = time.perf_counter()
            tokens += event.n_tokens
            if not first:
                first, first_tokens = last, event.n_tokens
        elif isinstance(event, Finished) and isinstance(event.result, Result):
            result = event.result
    if result is None or last == first:
        raise SystemExit("nb.stream gave no text to measure.")
    return result, (tokens - first_tokens) / (last - first)


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
    bare = BareLoop(
        path, threads=options.threads, context=options.context, batch=batch, micro_batch=micro_batch
    )
    model = nb.load(
        path,
        context_size=options.context,
        threads=options.threads,
        batch_size=batch,
        micro_batch=micro_batch,
        force=True,
    )
    pairs = []
    for i in range(-1, options.rounds):
        bare_first = i % 2 == 0
        if bare_first:
            made, seconds = bare.run(options.prompt, options.tokens)
        result, stream_rate = streamed(model, options.prompt, options.tokens)
        if not bare_first:
            made, seconds = bare.run(options.prompt, options.tokens)
        text = b"".join(bare.weights.piece(token) for token in made).decode("utf-8", "replace")
        if text != result.text:
            raise SystemExit(f"the two sides wrote different texts:\n{text!r}\n{result.text!r}")
        # The first pair warms both up.
        if i >= 0:
            pairs.append(((len(made) - 1) / seconds, stream_rate))
    model.unload()
    bare.close()

    table = Table(
        title=f"0.5B {options.type}, {options.threads} thread(s), {len(made)} tokens a run, tokens/s"
    )
    for heading in ("round", "bare loop", "nb.stream", "ratio"):
        table.add_column(heading, justify="right")
    ratios = [stream_rate / bare_rate for bare_rate, stream_rate in pairs]
    for i, ((bare_rate, stream_rate), ratio) in enumerate(zip(pairs, ratios, strict=True), 1):
        table.add_row(str(i), f"{bare_rate:.2f}", f"{stream_rate:.2f}", f"{ratio:.3f}")
    table.add_section()
    bare_median, stream_median = (statistics.median(side) for side in zip(*pairs, strict=True))
    table.add_row(
        "median",
        f"{bare_median:.2f}",
        f"{stream_median:.2f}",
        f"{statistics.median(ratios):.3f}",
        style="bold",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
