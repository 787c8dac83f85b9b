"""A busy machine: what is left of the speed while another process spins on every core.

    python benchmarks/busy.py                        # 0.5B q8_0, default threads and all
    python benchmarks/busy.py --tokens 64 --rounds 3

OpenMP's threads spin at barriers by default: with something else on the same cores, each waits for one that
is not running, and a naive setting loses far more than the share of CPU that the other process takes.
Each line loads the model in a process of its own (OpenMP reads its environment once), generates on a quiet
and on a busy machine in turns, and compares the loss of speed with the loss of CPU: how much of its quiet
CPU per second the process still got. A ratio of 1 or more means that nothing was lost beyond that share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _support import about, add_common_flags, endless, model_path, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.session import Model


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """Keep every core busy with a process of its own."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
        for spinner in spinners:
            spinner.wait()


def generate(model: Model, tokens: int) -> tuple[float, float]:
    """Return generated tokens per second, and the CPU seconds per second that this process got."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = model.infer("There was noise.", raw=True, max_tokens=tokens, logit_bias=endless(model))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rate = result.timings.tokens_per_second
    if rate is None:
        raise SystemExit("the model wrote too little to measure.")
    return rate, cpu / wall


def worker(options: argparse.Namespace) -> None:
    """Measure one setting in this process and print it as JSON."""
    import nbinfer as nb

    cores = os.cpu_count() or 1
    threads = options.worker_threads or None
    quiet, busy = [], []
    with nb.load(model_path(options.model), threads=threads, context_size=512, force=True) as model:
        generate(model, 4)
        for _ in range(options.rounds):
            quiet.append(generate(model, options.tokens))
            with spinning(cores):
                busy.append(generate(model, options.tokens))
        used = model.info.effective["threads"]
    print(json.dumps({"threads": used, "quiet": quiet, "busy": busy}))


def measure(options: argparse.Namespace, threads: int, policy: str | None) -> dict[str, Any]:
    """Run a worker with a number of threads (0: the default) and an OpenMP wait policy."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, str(Path(__file__)), "--model", options.model, "--tokens", str(options.tokens)]
    command += ["--rounds", str(options.rounds), "--worker-threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr.strip()[-800:] or f"the worker ended with code {done.returncode}.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure generation beside other work.")
    add_common_flags(parser, model="q8_0")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--worker-threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker_threads is not None:
        worker(options)
        return
    cores = os.cpu_count() or 1
    settings: list[tuple[str, int, str | None]] = [("nbinfer's default", 0, None)]
    if cores > 1:
        settings.append((f"all {cores} cores, nbinfer's waiting", cores, None))
        settings.append((f"all {cores} cores, OpenMP spinning", cores, "ACTIVE"))
    rows = []
    for name, threads, policy in settings:
        found = measure(options, threads, policy)
        quiet, quiet_cpu, busy, busy_cpu = (
            statistics.median(run[i] for run in found[side]) for side in ("quiet", "busy") for i in (0, 1)
        )
        speed, share = busy / quiet, busy_cpu / quiet_cpu
        rows.append((name, found["threads"], quiet, busy, speed, share, speed / share))
    show(
        f"{options.model}: {options.tokens} tokens, quiet and beside {cores} spinning process(es)",
        ("setting", "threads", "quiet tok/s", "busy tok/s", "speed left", "CPU left", "speed / CPU"),
        rows,
        notes=(about(),),
        target=options.json,
    )


if __name__ == "__main__":
    main()
