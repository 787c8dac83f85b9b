"""JSON from a schema against free text: tokens per second, nbinfer and llama-cpp-python.

    python benchmarks/structured.py                        # 0.5B, vocabulary of 151,936: where masks are dear
    python benchmarks/structured.py --rows 8 --rounds 3 --peer-rows 2

The rows of the constrained runs all fit one schema of strings of fixed length, numbers and a choice, so that
both kinds of run have as many tokens to write. Tokens that the schema leaves no choice about are not sampled
but count: what a user waits for is the text. The pattern leaves every choice: each token is sampled under a
mask, which shows what masks cost by themselves. Costs are CPU seconds; the runs take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from _support import Cost, about, add_common_flags, measured, model_path, peer_llama, show, words

import nbinfer as nb

if TYPE_CHECKING:
    from collections.abc import Callable

    Side = Callable[[int], tuple[int, Cost]]

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 40, "maxLength": 60},
        "tone": {"enum": ["angry", "neutral", "happy"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "summary": {"type": "string", "minLength": 60, "maxLength": 90},
    },
    "required": ["title", "tone", "stars", "summary"],
    "additionalProperties": False,
}


def prompts(n: int, seed: int) -> list[str]:
    """Return prompts with nothing in common."""
    return [f"{' '.join(words(24, seed=seed + i))} {i}" for i in range(n)]


def ours(model: nb.Model, options: argparse.Namespace, **constraint: Any) -> Side:
    """One row at a time, as a cell asks: the share of masking is largest there."""
    schema = "schema" in constraint

    def side(seed: int) -> tuple[int, Cost]:
        n, total = 0, Cost()
        for prompt in prompts(options.rows, seed):
            with measured() as cost:
                result = model.infer(
                    prompt, raw=True, max_tokens=400 if schema else options.new, **constraint
                )
            if schema:
                json.loads(result.text)
            n += result.usage.completion_tokens
            total += cost
        return n, total

    return side


def peer(llama: Any, options: argparse.Namespace, *, constrained: bool) -> Side:
    from llama_cpp import llama_grammar

    text = json.dumps(SCHEMA)

    def side(seed: int) -> tuple[int, Cost]:
        n, total = 0, Cost()
        for prompt in prompts(options.peer_rows, seed):
            grammar = (
                llama_grammar.LlamaGrammar.from_json_schema(text, verbose=False) if constrained else None
            )
            with measured() as cost:
                answer = llama(prompt, max_tokens=options.new, temperature=0.0, grammar=grammar)
            n += answer["usage"]["completion_tokens"]
            total += cost
        return n, total

    return side


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure constrained decoding.")
    add_common_flags(parser, model="q4_0")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--peer-rows", type=int, default=1, help="rows for llama-cpp-python, which is slow")
    parser.add_argument("--new", type=int, default=48, help="tokens of a free run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()

    path = model_path(options.model)
    threads = options.threads
    with ExitStack() as stack:
        model = stack.enter_context(nb.load(path, threads=threads, context_size=options.context, force=True))
        llama = stack.enter_context(
            peer_llama(path, n_ctx=options.context, n_threads=threads, n_threads_batch=threads)
        )
        sides = {
            "nbinfer, free": ours(model, options),
            "nbinfer, any text by a pattern": ours(model, options, regex="(?s:.)*"),
            "nbinfer, JSON schema": ours(model, options, schema=SCHEMA),
            "llama-cpp-python, free": peer(llama, options, constrained=False),
            "llama-cpp-python, JSON schema": peer(llama, options, constrained=True),
        }
        with measured() as first:
            model.infer("x", raw=True, schema=SCHEMA, max_tokens=400)  # builds the tokenizer's table
        model.infer("x", raw=True, max_tokens=4)
        rates: dict[str, list[float]] = {name: [] for name in sides}
        tokens = dict.fromkeys(sides, 0)
        for i in range(options.rounds):
            for name in list(sides) if i % 2 == 0 else reversed(sides):
                n, cost = sides[name](1000 * (i + 1))
                rates[name].append(n / cost.cpu)
                tokens[name] += n
        vocabulary = llama.n_vocab()

    table = []
    for name in sides:
        free = rates[f"{name.rsplit(',', 1)[0]}, free"]
        ratio = statistics.median(a / b for a, b in zip(rates[name], free, strict=True))
        table.append((name, tokens[name], statistics.median(rates[name]), ratio))
    show(
        f"{options.model}: one row at a time, vocabulary of {vocabulary:,}, {threads} thread(s)",
        ("side", "tokens", "tokens / CPU s", "x free"),
        table,
        notes=(
            f"the first constrained answer, with the tokenizer's table: {first.cpu:.1f} CPU s",
            about("llguidance"),
        ),
        target=options.json,
    )


if __name__ == "__main__":
    main()
