"""How fast a loaded model is here: load, first token, prompt and generation rates, memory."""

from __future__ import annotations

import itertools
import secrets
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, Sampling
from nbinfer.contract.results import Delta, Finished, Result
from nbinfer.session import get

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from nbinfer.session import Model

COLUMNS = (
    "parallel",
    "run",
    "prompt_tokens",
    "new_tokens",
    "load_seconds",
    "first_token_seconds",
    "prompt_tokens_per_second",
    "tokens_per_second",
    "token_p50_seconds",
    "token_p95_seconds",
    "token_p99_seconds",
    "cpu_seconds",
    "peak_memory_bytes",
)
_SPREAD = 7919  # a prime: the prompts of different runs begin differently
_SAMPLE_SECONDS = 0.02


def bench(
    model: Model | str | None = None,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    parallel: int | tuple[int, ...] = 1,
    runs: int = 3,
) -> pd.DataFrame:
    """Measure a loaded model with prompts and answers of fixed length, after a warm-up run.

    The prompts never begin alike, so that no cached prefix helps; the answers are greedy and do not end
    before their length. Nothing else should use the model meanwhile.

    Parameters
    ----------
    model
        A loaded model or its name; None is the default, or the only one loaded.
    prompt_tokens, new_tokens
        Tokens of each prompt (1 or more) and of each answer (2 or more).
    parallel
        Requests at once; several numbers measure each.
    runs
        Measured runs of each.

    Returns
    -------
    A DataFrame of one row per run: the tokens that a prompt and an answer really had; ``load_seconds`` of the
    model; ``first_token_seconds``, the median over
    the requests; ``prompt_tokens_per_second`` until the last request had its first token, and
    ``tokens_per_second`` after that, over all requests; percentiles of the seconds between two tokens;
    ``cpu_seconds`` of this process (None for a model elsewhere); ``peak_memory_bytes``, the largest resident
    set of this process, or of the model's own, during the run.
    ``frame.plot(x="run", y="tokens_per_second")`` draws one.

    Raises
    ------
    NotSupported
        The model does not write text.
    RequestError
        A length does not fit the context, or a number is too small.
    """
    import pandas as pd

    chosen = get(model)
    levels = (parallel,) if isinstance(parallel, int) else tuple(parallel)
    _check(chosen, prompt_tokens, new_tokens, levels, runs)
    # Elsewhere than before: an earlier call's prompts may still be in the context.
    seeds = itertools.count(secrets.randbits(30))
    _run(chosen, prompt_tokens, new_tokens, levels[0], seeds)
    rows = []
    for level in levels:
        for i in range(1, runs + 1):
            measured = _run(chosen, prompt_tokens, new_tokens, level, seeds)
            rows.append({"parallel": level, "run": i, "load_seconds": chosen.load_seconds} | measured)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs["model"] = chosen.name
    frame.attrs["backend"] = chosen.info.version
    return frame


def _check(model: Model, prompt_tokens: int, new_tokens: int, levels: tuple[int, ...], runs: int) -> None:
    if model.mode != Mode.COMPLETION:
        raise NotSupported(f"{model.name} is loaded for {model.mode}: bench measures models that write text.")
    least = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "runs": (runs, 1)}
    least |= {"parallel": (min(levels, default=0), 1)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise RequestError(f"{name}={value}: it must be at least {minimum}.")
    size = model.info.context_size
    needed = (prompt_tokens + new_tokens) * max(levels)
    if needed > size:
        raise RequestError(
            f"{max(levels)} requests of {prompt_tokens} + {new_tokens} tokens need {needed:,} tokens of "
            f"context, and {model.name} has {size:,}.\n"
            f"Load it with context_size={needed}, or take shorter ones."
        )


def _run(
    model: Model, prompt_tokens: int, new_tokens: int, level: int, seeds: itertools.count[int]
) -> dict[str, Any]:
    """Run ``level`` requests at once and return what they took."""
    prompts = [_prompt(model, prompt_tokens, next(seeds)) for _ in range(level)]
    # Engines in this process name their end tokens; elsewhere an answer may end early, and its real length
    # is what counts.
    never_end = dict.fromkeys(getattr(model.engine, "end_tokens", ()), -100.0)
    arrivals: list[list[float]] = [[] for _ in prompts]
    results: list[Result | BaseException] = []

    def follow(i: int) -> None:
        request = CompletionRequest(
            prompt=prompts[i], max_tokens=new_tokens, sampling=Sampling(logit_bias=never_end)
        )
        try:
            for event in model.submit(request):
                if isinstance(event, Delta):
                    arrivals[i].append(time.perf_counter())
                elif isinstance(event, Finished) and isinstance(event.result, Result):
                    results.append(event.result)
        except BaseException as e:  # noqa: BLE001 - it is raised where the run is waited for
            results.append(e)

    with _PeakMemory(model) as memory:
        cpu, began = time.process_time(), time.perf_counter()
        _together(follow, level)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    done = [r for r in results if isinstance(r, Result)]
    if len(done) < level:
        raise next(r for r in results if isinstance(r, BaseException))
    first = [r.timings.first_token_seconds or seconds for r in done]
    prefill = max(first)
    gaps = sorted(b - a for times in arrivals for a, b in itertools.pairwise(times)) or [0.0]
    # What was written before the last request had its first token is not part of the generation rate.
    early = sum(1 for times in arrivals for t in times if t - began <= prefill)
    late = max(0, sum(len(times) for times in arrivals) - early)
    return {
        "prompt_tokens": statistics.median_low([r.usage.prompt_tokens for r in done]),
        "new_tokens": statistics.median_low([r.usage.completion_tokens for r in done]),
        "first_token_seconds": statistics.median(first),
        "prompt_tokens_per_second": sum(r.timings.prompt_tokens for r in done) / prefill,
        "tokens_per_second": late / (seconds - prefill) if seconds > prefill else None,
        "token_p50_seconds": _percentile(gaps, 0.50),
        "token_p95_seconds": _percentile(gaps, 0.95),
        "token_p99_seconds": _percentile(gaps, 0.99),
        "cpu_seconds": cpu if model.where == "kernel" else None,
        "peak_memory_bytes": memory.peak,
    }


def _together(work: Callable[[int], None], n: int) -> None:
    """Call ``work(0)`` to ``work(n - 1)`` at once and wait; an interrupt is raised at once."""
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)


def _prompt(model: Model, n: int, seed: int) -> str:
    """Return a text of ``n`` tokens, or just below, that begins as no other seed's does."""
    numbers = [str((seed * _SPREAD + i * i) % 9973) for i in range(n + 1)]
    low, high = 1, len(numbers)
    while low < high:
        middle = (low + high + 1) // 2
        text = " ".join(numbers[:middle])
        low, high = (middle, high) if _count(model, text) <= n else (low, middle - 1)
    return " ".join(numbers[:low])


def _count(model: Model, text: str) -> int:
    return model.engine.render(CompletionRequest(prompt=text))[1]


class _PeakMemory:
    """Watches the resident memory of the process that holds the model while the block runs."""

    def __init__(self, model: Model) -> None:
        import psutil

        self._process = psutil.Process(getattr(model.engine, "pid", None))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nbinfer-bench-memory", daemon=True)
        self.peak = 0

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._process.memory_info().rss)
            if self._stop.wait(_SAMPLE_SECONDS):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()


def _percentile(ordered: list[float], share: float) -> float:
    """The value below which ``share`` of the ordered values lie (nearest rank)."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
