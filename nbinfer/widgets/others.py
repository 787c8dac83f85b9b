"""Plans of models that llama.cpp does not run: what vLLM takes, and what is known of the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer import session
from nbinfer.contract.errors import GGUFParseError, NbinferError
from nbinfer.contract.units import human_bytes
from nbinfer.memory.show import parts
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

    from nbinfer.gguf.pipeline import PipelineHeader
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
    return _images(ref, header, settings)


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


def _images(ref: str, header: PipelineHeader, settings: Mapping[str, Any]) -> Row:
    """Return the plan of an image pipeline, with its default size; it has none of the sliders' settings."""
    from nbinfer.memory import estimate_images

    made = estimate_images(header, name=ref.rstrip("/").rsplit("/", 1)[-1])
    limits: Row = {"context": [], "kv_types": [], "layers": 0, "parallel": 0}
    bars = [
        plan_bar(
            f"d{i}",
            device.name,
            device.total,
            f"needs {human_bytes(device.required)}, free {human_bytes(device.available)}",
            [("taken", "in use now", max(0, device.total - device.available)), *parts(device)],
        )
        for i, device in enumerate(made.devices)
    ]
    needs = "; ".join(
        f"{human_bytes(device.required)} of {human_bytes(device.available)} free on {device.name}"
        for device in made.devices
    )
    text = needs if made.verdict == "fits" else made.reason.removeprefix(f"{made.verdict}: ")
    return _whole(
        ref,
        settings,
        limits,
        word=made.verdict,
        text=f"{text}, for {made.size[0]}x{made.size[1]} pixels",
        bars=bars,
        source=f"{made.dtype}, by formula",
    )


def _least(
    ref: str, settings: Mapping[str, Any], limits: Row, known: list[tuple[str, str, int]], more: str
) -> Row:
    """Return a plan of main memory that says what it takes at least."""
    from nbinfer.memory import machine

    ram = machine().ram
    needed = sum(size for _, _, size in known)
    text = f"at least {human_bytes(needed)} of {human_bytes(ram.available)} free on RAM"
    bar = plan_bar(
        "d0",
        "RAM",
        ram.total,
        f"needs at least {human_bytes(needed)}",
        [("taken", "in use now", max(0, ram.total - ram.available)), *known],
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
