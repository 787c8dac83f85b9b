"""Plans of models that llama.cpp does not run: those that vLLM serves, and image pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer import session
from nbinfer.contract.errors import GGUFParseError, NbinferError
from nbinfer.widgets.planner import (
    KV_TYPES,
    LONGEST_UNKNOWN,
    MOST_AT_ONCE,
    VLLM_ONLY,
    context_stops,
    picture,
    whole_settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.memory.images import ImageEstimate
    from nbinfer.memory.vllm import VllmEstimate
    from nbinfer.widgets.state import Row


def plan(ref: str, settings: Mapping[str, Any], problem: NbinferError) -> Row:
    """Return a plan by formula, or without numbers where there are none: the model may still be loaded.

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
    from nbinfer.memory import estimate_images
    from nbinfer.models import peek

    name = ref.rstrip("/").rsplit("/", 1)[-1]
    limits: Row = {"context": [], "kv_types": [], "layers": 0, "parallel": 0}
    broken = isinstance(problem, GGUFParseError)
    header = None if broken else peek(ref, aliases=session.session.aliases).header
    if header is None or isinstance(header, Header):
        limits |= {"context": context_stops(LONGEST_UNKNOWN), "parallel": MOST_AT_ONCE}
        return _unknown(name, settings, {**limits, "kv_types": list(KV_TYPES)}, problem)
    try:
        if not isinstance(header, SafetensorsHeader):
            made = estimate_images(header, name=name)
            more = f"for {made.size[0]}x{made.size[1]} pixels"
            return _whole(made, whole_settings(settings, limits), limits, more)
        longest = header.context_length or LONGEST_UNKNOWN
        limits |= {"context": context_stops(longest), "parallel": MOST_AT_ONCE}
        return _vllm(name, header, settings, limits)
    except NbinferError as error:  # its configuration lacks what the formulas need
        return _unknown(name, settings, limits, error)


def _vllm(name: str, header: SafetensorsHeader, settings: Mapping[str, Any], limits: Row) -> Row:
    from nbinfer.memory.vllm import estimate_load

    whole = whole_settings(settings, limits)
    # Set by a piece of advice; vLLM's own words, without a slider.
    whole |= {key: settings[key] for key in VLLM_ONLY if isinstance(settings.get(key), int | float)}
    options = {key: whole[key] for key in ("context_size", *VLLM_ONLY) if key in whole}
    made = estimate_load(header, name=name, **options)
    share = f"vLLM takes {made.utilization:.0%} of the GPU whatever the model" if made.utilization else ""
    return _whole(made, whole, limits, share)


def _whole(made: VllmEstimate | ImageEstimate, whole: Row, limits: Row, more: str) -> Row:
    drawn = picture(made)
    drawn["verdict"]["text"] = ", ".join(filter(None, (drawn["verdict"]["text"], more)))
    # What a request sets, such as the size of an image, is no setting of a load.
    usable = {*whole, *VLLM_ONLY}
    advice = [
        {"label": one.text, "settings": dict(one.changes)}
        for one in made.advice()
        if usable.issuperset(one.changes)
    ]
    known = {"name": made.model, "settings": whole, "limits": limits}
    return {**known, **drawn, "advice": advice, "source": "by formula"}


def _unknown(name: str, settings: Mapping[str, Any], limits: Row, reason: NbinferError) -> Row:
    return {
        "name": name,
        "settings": whole_settings(settings, limits),
        "limits": limits,
        "bars": [],
        "segments": [],
        "verdict": {"word": "unknown", "kind": "off", "text": str(reason).splitlines()[0]},
        "advice": [],
        "source": "",
    }
