"""The rows of a frame through one sidecar: nbinfer's frames beside distribatch, on OpenAI's API.

    python benchmarks/frames_peer.py --peer-python /tmp/peer/bin/python         # about 2 minutes
    python benchmarks/frames_peer.py --rows 2000 --rounds 5 --peer-python …

distribatch (`pip install distribatch openai` in a Python of its own, given by flag) is the DataFrame library
for OpenAI-style servers that installs beside pandas 3 and asks for chat completions; both sides have 16
requests with the server at once. The first table is time: the sides take turns, the ratio is the median of
the pairs, and what they wrote is compared. The second is what each does with a frame that has a missing value
and a text that is too long, and with an interrupt at half of the rows followed by the same call in a new
process; what is computed again is counted at the server. openaivec, which also installs beside pandas 3, asks
for OpenAI's Responses API only, which few local servers have, this one not among them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from _support import about, show

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS = 12
AT_ONCE = 16

# Both read rows on standard input, a JSON list a line, and answer with what came back and what it cost.
OURS = """
import json, os, sys, time
import pandas as pd
import nbinfer as nb
endpoint = {"base_url": sys.argv[1], "api_key": os.environ["KEY"], "model": "demo", "concurrency": 16}
keep = sys.argv[2] != "-"
for line in sys.stdin:
    frame = pd.DataFrame({"text": pd.Series(json.loads(line), dtype=object)})
    wall, cpu = time.perf_counter(), time.process_time()
    out = nb.complete(frame, "{text}", endpoints=[endpoint], max_tokens=12, cache=keep, progress=False)
    cost = time.perf_counter() - wall, time.process_time() - cpu
    said = out["completion"].astype(object)
    print(json.dumps({"cost": cost, "text": [None if pd.isna(t) else t for t in said],
                      "error": [None if pd.isna(e) else e for e in out["error"]]}), flush=True)
"""
PEER = """
import json, os, sys, time
import pandas as pd
from distribatch import GenerateJob, Sampling, models
model = models.openai("demo", base_url=sys.argv[1], api_key_env="KEY")
job = GenerateJob(model=model, prompt="{text}", sampling=Sampling(max_tokens=12),
                  engine_options={"max_concurrency": 16})
where = {} if sys.argv[2] == "-" else {"checkpoint": sys.argv[2], "id_col": "id"}
for line in sys.stdin:
    rows = json.loads(line)
    frame = pd.DataFrame({"id": range(len(rows)), "text": pd.Series(rows, dtype=object)})
    wall, cpu = time.perf_counter(), time.process_time()
    out = job.run(frame, **where)
    cost = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"cost": cost, "text": [None if pd.isna(t) else t for t in out["output"]],
                      "error": [None if pd.isna(e) else e for e in out["output_error"]]}), flush=True)
"""


def rows_of(count: int, seed: int) -> list[str | None]:
    return [f"What is {(seed * 31 + i) % 97} plus {i // 7}? This is question {i}." for i in range(count)]


class Server:
    """The sidecar, on a port of its own."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from nbinfer.cli import main; main()", "serve", "demo", "--port", "0"],
            env={**os.environ, "NBINFER_RUNTIME_DIR": folder},
            stdout=subprocess.PIPE,
            text=True,
        )
        said: dict[str, str] = {}
        while "token" not in said:
            line = self.process.stdout.readline() if self.process.stdout else ""
            if not line:
                raise SystemExit("the sidecar did not start")
            key, _, value = line.strip().partition(" ")
            said[key] = value.strip()
        self.address, self.token = said["address"], said["token"]
        self._key = {"Authorization": f"Bearer {self.token}"}
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        url = f"{self.address}/chat/completions"
        httpx.post(url, json=body, headers=self._key, timeout=300).raise_for_status()

    def answers(self) -> int:
        """Requests that were answered in full so far."""
        page = httpx.get(f"{self.address.removesuffix('/v1')}/metrics", headers=self._key, timeout=30).text
        lines = [
            line
            for line in page.splitlines()
            if line.startswith("nbinfer_requests_total") and "chat/completions" in line and '"ok"' in line
        ]
        return int(sum(float(line.rpartition(" ")[2]) for line in lines))


@contextmanager
def side(python: str, program: str, server: Server, keep: str = "-") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [python, "-c", program, server.address, keep],
        env={**os.environ, "KEY": server.token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def asked(process: subprocess.Popen[str], rows: list[str | None]) -> dict[str, Any]:
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise SystemExit("no pipes")
    process.stdin.write(json.dumps(rows) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(process.stderr.read()[-2000:])
    found: dict[str, Any] = json.loads(line)
    return found


def race(server: Server, sides: dict[str, tuple[str, str]], options: Any) -> None:
    ours, peer = sides
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    same = total = 0
    with side(*sides[ours], server) as first, side(*sides[peer], server) as second:
        processes = {ours: first, peer: second}
        for name in sides:
            asked(processes[name], rows_of(8, 99))
        for number in range(options.rounds):
            rows = rows_of(options.rows, number)
            said = {}
            for name in list(sides) if number % 2 else list(sides)[::-1]:
                found = asked(processes[name], rows)
                if any(found["error"]):
                    raise SystemExit(f"{name}: {next(e for e in found['error'] if e)}")
                costs[name].append(tuple(found["cost"]))
                said[name] = found["text"]
            same += sum(a == b for a, b in zip(said[ours], said[peer], strict=True))
            total += len(rows)
    table = []
    for name in sides:
        ratios = [them[0] / us[0] for us, them in zip(costs[ours], costs[name], strict=True)]
        wall, cpu = (statistics.median(cost[i] for cost in costs[name]) for i in (0, 1))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.append((name, wall, 1000 * cpu / options.rows, statistics.median(ratios), spread))
    show(
        f"{options.rows} rows of up to {TOKENS} new tokens, demo model in the sidecar, {AT_ONCE} at once",
        ("side", "wall s", "its own CPU ms a row", "its time / nbinfer's", "pairs"),
        table,
        notes=(f"same text in {same:,} of {total:,} rows", about("pandas", "openai")),
        target=options.json,
    )


def odd(server: Server, sides: dict[str, tuple[str, str]], options: Any) -> None:
    table = []
    long = "word " * 20_000
    rows = rows_of(options.rows, 7)
    for name, (python, program) in sides.items():
        with side(python, program, server) as process:
            found = asked(process, ["What is 1 plus 1?", None, long, "What is 2 plus 2?"])
        null = found["error"][1] or f"no error; {_said(found['text'][1])}"
        bad = found["error"][2] or f"no error; {_said(found['text'][2])}"
        fine = sum(found["error"][i] is None for i in (0, 3))
        kept = []
        for checkpoint in (False, True) if program is PEER else (True,):
            with tempfile.TemporaryDirectory() as folder:
                before, again = interrupted(server, python, program, rows, folder if checkpoint else "-")
            words = "" if program is OURS else "with a checkpoint: " if checkpoint else "without: "
            kept.append(f"{words}{before} answered, then {again} asked")
        table.append((name, null[:60], bad[:60], f"{fine}/2", "; ".join(kept)))
    show(
        f"A missing value, a text that is too long, and an interrupt at half of {options.rows} rows",
        ("side", "missing value", "too long", "others", "interrupted, then run again"),
        table,
        target=options.json,
    )


def _said(text: str | None) -> str:
    return "null" if text is None else f"answered {text[:24]!r}"


def interrupted(
    server: Server, python: str, program: str, rows: list[str | None], keep: str
) -> tuple[int, int]:
    """Return how many rows were answered before an interrupt at half, and how many by the same call after."""
    line = json.dumps(rows) + "\n"
    start = server.answers()
    with side(python, program, server, keep) as process:
        if process.stdin is None:
            raise SystemExit("no pipes")
        process.stdin.write(line)
        process.stdin.flush()
        while server.answers() - start < len(rows) // 2 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
    time.sleep(1)
    before = server.answers() - start
    with side(python, program, server, keep) as process:
        asked(process, rows)
    return before, server.answers() - start - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", help="a Python with distribatch and openai")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    options = parser.parse_args()
    sides = {"nbinfer, nb.complete(endpoints=…)": (sys.executable, OURS)}
    if options.peer_python:
        sides["distribatch, GenerateJob.run"] = (options.peer_python, PEER)
    else:
        # Against itself: what the table cannot tell apart.
        sides["nbinfer, again (no --peer-python)"] = (sys.executable, OURS)
    with tempfile.TemporaryDirectory() as results, tempfile.TemporaryDirectory(prefix="nbi-") as folder:
        os.environ["NBINFER_CACHE"] = results
        server = Server(folder)
        try:
            race(server, sides, options)
            odd(server, sides, options)
        finally:
            server.process.terminate()
            server.process.wait(30)


if __name__ == "__main__":
    main()
