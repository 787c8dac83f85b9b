"""Plans of models that llama.cpp does not run: what vLLM takes, and what is known of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer import session
from nbinfer.contract.errors import GGUFParseError, NbinferError
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import human_bytes
from nbinfer.widgets.planner import (
    KV_TYPES,
    LONGEST_UNKNOWN,
    MOST_AT_ONCE,
    VERDICT_KINDS,
    context_stops,
    plan_bar,
    whole_settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.widgets.state import Row


def plan(ref: str, settings: Mapping[str, Any], problem: NbinferError) -> Row:
    """Return a plan, with numbers as far as there are any; the model may be loaded without.

    Parameters
    ----------
    ref
        The model, as for :func:`nbinfer.load`.
    settings
        Those of the page; may lack some.
    problem
        Why there is no estimate of llama.cpp's kind.
    """
    from nbinfer.gguf import Header
    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.models import peek

    header = (
        None if isinstance(problem, GGUFParseError) else peek(ref, aliases=session.session.aliases).header
    )
    if header is None or isinstance(header, Header):
        limits = _limits(LONGEST_UNKNOWN, kv_types=list(KV_TYPES))
        return _whole(ref, settings, limits, text=str(problem))
    if isinstance(header, SafetensorsHeader):
        limits = _limits(header.context_length or LONGEST_UNKNOWN)
        try:
            return _vllm(ref, header, settings, limits)
        except NbinferError as error:  # its configuration lacks what the formulas need
            return _whole(ref, settings, limits, text=str(error).splitlines()[0])
    return _weights(ref, header, settings)


def _limits(longest: int, *, kv_types: list[str] | None = None) -> Row:
    limits = {"layers": 0, "parallel": MOST_AT_ONCE, "kv_types": kv_types or []}
    return {"context": context_stops(longest), **limits}


def _whole(
    ref: str,
    settings: Mapping[str, Any],
    limits: Row,
    *,
    text: str,
    word: str = "unknown",
    bars: list[Row] | None = None,
    advice: list[Row] | None = None,
    source: str = "",
) -> Row:
    bars = bars or []
    return {
        "name": ref.rstrip("/").rsplit("/", 1)[-1],
        "settings": whole_settings(settings, limits),
        "limits": limits,
        "bars": bars,
        "segments": [each for bar in bars for each in bar["segments"]],
        "verdict": {"word": word, "kind": VERDICT_KINDS.get(word, "off"), "text": text},
        "advice": advice or [],
        "source": source,
    }


def _vllm(ref: str, header: SafetensorsHeader, settings: Mapping[str, Any], limits: Row) -> Row:
    from nbinfer.memory import estimate_vllm, machine

    here = machine()
    context = whole_settings(settings, limits)["context_size"]
    if not here.gpus:
        return _vllm_on_cpu(ref, header, settings, limits)
    made = estimate_vllm(header, context_size=context)
    total = round(made.budget / made.utilization)
    overhead = sum(made.overhead) // 2
    parts = [
        ("taken", "in use now", max(0, total - made.free)),
        ("weights", "weights", made.weights),
        ("cache", "KV cache", max(0, made.budget - made.weights - overhead)),
        ("overhead", "overhead", overhead),
    ]
    text = f"takes {human_bytes(made.budget)} whatever the model, free {human_bytes(made.free)}"
    fitting = made.verdict == "does not fit" and 0 < made.longest_context < made.max_model_len
    advice = [
        {"label": f"context {made.longest_context:,}", "settings": {"context_size": made.longest_context}}
    ]
    return _whole(
        ref,
        settings,
        limits,
        word=made.verdict,
        text=made.reason.removeprefix(f"{made.verdict}: "),
        bars=[plan_bar("gpu", "GPU", total, text, parts)],
        advice=advice if fitting else [],
        source="by formula, for vLLM",
    )


def _vllm_on_cpu(ref: str, header: SafetensorsHeader, settings: Mapping[str, Any], limits: Row) -> Row:
    from nbinfer.memory.vllm import cache_bytes

    whole = whole_settings(settings, limits)
    cache = cache_bytes(header, tokens=whole["context_size"]) * (whole["parallel"] or 1)
    return _least(
        ref,
        settings,
        limits,
        [("weights", "weights", header.weights_bytes), ("cache", "KV cache", cache)],
        "what vLLM itself takes comes on top",
    )


def _weights(ref: str, header: Any, settings: Mapping[str, Any]) -> Row:
    """Return what is known of a model of a kind that has no formula: its weights."""
    image = Mode.IMAGE_GENERATION in header.modes
    limits: Row = {"context": [], "kv_types": [], "layers": 0, "parallel": 0}
    known = [("weights", "weights", header.weights_bytes)]
    return _least(
        ref, settings, limits, known, "what a picture takes while it is made comes on top" if image else ""
    )


def _least(
    ref: str, settings: Mapping[str, Any], limits: Row, parts: list[tuple[str, str, int]], more: str
) -> Row:
    """Return a plan of main memory that says what it takes at least."""
    from nbinfer.memory import machine

    ram = machine().ram
    needed = sum(size for _, _, size in parts)
    text = f"at least {human_bytes(needed)} of {human_bytes(ram.available)} free on RAM"
    bar = plan_bar(
        "d0",
        "RAM",
        ram.total,
        f"needs at least {human_bytes(needed)}",
        [("taken", "in use now", max(0, ram.total - ram.available)), *parts],
    )
    return _whole(
        ref,
        settings,
        limits,
        word="does not fit" if needed > ram.available else "unknown",
        text=f"{text}; {more}" if more else text,
        bars=[bar],
        source="by formula",
    )
