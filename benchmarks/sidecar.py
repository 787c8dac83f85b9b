"""What the sidecar costs: the same model in the kernel and in the sidecar, asked in turns.

    python benchmarks/sidecar.py                        # 0.5B q8_0, one thread, 7 rounds of 64 tokens
    python benchmarks/sidecar.py --rounds 15 --asks 200

Claims: tokens per second at least 0.97 of the kernel's, 5 ms more to the first token at most, and a new
kernel has an answer from a loaded model within a second.

Tokens per second are measured on the 0.5B model (random weights), from the first token to the last. So is the
processor time of a token, over every process that takes part: this one, the service and the runner. It
hardly moves when other programs run. The time to the first token is measured on the demo model, whose own
share of it is small, with a prompt that its cache holds: what is left is the way there and back. The new
kernels are Jupyter's own, which have imported nbinfer and nothing else: the time runs from the call of
``nb.load`` to the end of the answer, and most of it is imports, so its processor time is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

import nbinfer as nb
from nbinfer.contract.results import Delta
from nbinfer.sidecar import discovery

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from perf_model import perf_model

FIRST = "What is the capital of France?"
PROMPT = "Once upon a time there was a model that wrote noise, quickly."


def processor_seconds() -> float:
    """Processor time so far of this process, the service and the runners."""
    total = 0.0
    found = discovery.find()
    processes = [psutil.Process()]
    if found is not None:
        service = psutil.Process(found.pid)
        processes += [service, *service.children()]
    for process in processes:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def streamed(model: nb.Model, n_tokens: int) -> tuple[str, float, float]:
    """Return the text, its tokens per second, and the processor time of a token in ms."""
    text, stamps, counts = [], [], []
    began = processor_seconds()
    stream = model.stream(PROMPT, raw=True, max_tokens=n_tokens)
    for event in stream.events():
        if isinstance(event, Delta):
            stamps.append(time.perf_counter())
            counts.append(event.n_tokens)
            text.append(event.text)
    used = processor_seconds() - began
    # A piece may stand for several tokens; the result counts them.
    made = stream.result().usage.completion_tokens
    rate = (made - 1) / (stamps[-1] - stamps[0])
    return "".join(text), rate, 1000 * used / made


def first_token(model: nb.Model) -> float:
    """Return the seconds to the first piece of text."""
    began = time.perf_counter()
    stream = model.stream(FIRST, max_tokens=2)
    for _ in stream:
        break
    seconds = time.perf_counter() - began
    stream.cancel()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the sidecar costs.")
    parser.add_argument("--type", default="q8_0", choices=("q8_0", "q4_0", "f16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--asks", type=int, default=60)
    parser.add_argument("--kernels", type=int, default=7, help="new kernels that attach")
    parser.add_argument("--only", choices=("speed", "first", "attach"), action="append")
    options = parser.parse_args()
    os.environ["NBINFER_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="nbi-")
    places = ("kernel", "sidecar")
    load: dict[str, Any] = {"context_size": 1024, "threads": options.threads, "keep_alive": -1, "force": True}
    try:
        parts = options.only or ("speed", "first", "attach")
        small = {place: nb.load("demo", where=place, name=f"small-{place}", **load) for place in places}
        if "speed" in parts:
            path = perf_model(options.type)
            large = {place: nb.load(path, where=place, name=f"large-{place}", **load) for place in places}
            report_speed(large, options)
        if "first" in parts:
            report_first_token(small, options.asks)
        if "attach" in parts:
            report_attach(load, options.kernels)
    finally:
        discovery.stop()


def in_turns(i: int) -> tuple[str, str]:
    """Return the places in the order of round ``i``."""
    return ("kernel", "sidecar") if i % 2 else ("sidecar", "kernel")


def report_speed(models: dict[str, nb.Model], options: argparse.Namespace) -> None:
    rows = []
    for i in range(-1, options.rounds):
        found = {place: streamed(models[place], options.tokens) for place in in_turns(i)}
        if found["kernel"][0] != found["sidecar"][0]:
            raise SystemExit("the two sides wrote different texts.")
        if i >= 0:  # the first pair warms both up
            (_, rate, cost), (_, far_rate, far_cost) = found["kernel"], found["sidecar"]
            rows.append((rate, far_rate, far_rate / rate, cost, far_cost, far_cost - cost))
    table = Table(title=f"0.5B {options.type}, {options.threads} thread(s), {options.tokens} tokens a run")
    for heading in (
        "round",
        "kernel tok/s",
        "sidecar tok/s",
        "ratio",
        "kernel CPU ms",
        "sidecar CPU ms",
        "more",
    ):
        table.add_column(heading, justify="right")
    medians = tuple(statistics.median(column) for column in zip(*rows, strict=True))
    for name, row in [*((str(i), row) for i, row in enumerate(rows, 1)), ("median", medians)]:
        table.add_row(name, *(f"{value:.3f}" for value in row))
    Console(width=110).print(table)


def report_first_token(models: dict[str, nb.Model], asks: int) -> None:
    times: dict[str, list[float]] = {"kernel": [], "sidecar": []}
    for i in range(-5, asks):
        for place in in_turns(i):
            seconds = first_token(models[place])
            if i >= 0:
                times[place].append(1000 * seconds)
    table = Table(title=f"ms to the first token, {asks} asks")
    for heading in ("place", "p10", "median", "p90"):
        table.add_column(heading, justify="right")
    for place, values in times.items():
        ranked = statistics.quantiles(values, n=10)
        table.add_row(place, f"{ranked[0]:.2f}", f"{statistics.median(values):.2f}", f"{ranked[-1]:.2f}")
    differences = [far - near for near, far in zip(times["kernel"], times["sidecar"], strict=True)]
    table.add_row("more, pair by pair", "", f"{statistics.median(differences):.2f}", "")
    Console(width=110).print(table)


def report_attach(load: dict[str, Any], kernels: int) -> None:
    """Attach new kernels to a loaded model."""
    rows = []
    for _ in range(kernels):
        found = attached(load)
        if not found.pop("already"):
            raise SystemExit("the model was not there: it was loaded again.")
        rows.append(found)
    headings = ("load ms", "answer ms", "together ms", "processor ms")
    table = Table(title=f"a new kernel and a loaded model, {kernels} kernels")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, choose in (("least", min), ("median", statistics.median), ("most", max)):
        table.add_row(name, *(f"{choose(row[heading] for row in rows):.0f}" for heading in headings))
    Console(width=110).print(table)


def attached(load: dict[str, Any]) -> dict[str, Any]:
    """Return the times of one new kernel, in ms."""
    from jupyter_client.manager import KernelManager

    code = f"""
import json, time
clock, cpu = time.perf_counter(), time.process_time()
m = nb.load("demo", where="sidecar", name="small-sidecar", **{load!r})
loaded = time.perf_counter()
assert m.infer({FIRST!r}, max_tokens=4).text
end, cpu = time.perf_counter(), time.process_time() - cpu
times = {{"load ms": loaded - clock, "answer ms": end - loaded, "together ms": end - clock}}
times = {{name: 1000 * seconds for name, seconds in {{**times, "processor ms": cpu}}.items()}}
print(json.dumps({{"already": m.engine.hold.already, **times}}))
"""
    manager = KernelManager(kernel_name="python3", transport="ipc")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    said: list[str] = []

    def note(message: dict[str, Any]) -> None:
        if message["msg_type"] in ("stream", "error"):
            said.append(message["content"].get("text") or str(message["content"]))

    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive("import nbinfer as nb", timeout=60)
        client.execute_interactive(code, timeout=120, output_hook=note)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    found: dict[str, Any] = json.loads("".join(said))
    return found


if __name__ == "__main__":
    main()
