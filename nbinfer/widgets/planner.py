"""What the widgets ask of the memory room: how much a model takes, and how much there is."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from nbinfer import session
from nbinfer.contract.errors import GGUFParseError, NbinferError, NotSupported
from nbinfer.contract.units import human_bytes
from nbinfer.memory import defaults
from nbinfer.memory.show import parts
from nbinfer.widgets import words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.memory import Estimate, Machine
    from nbinfer.memory.images import ImageEstimate
    from nbinfer.memory.vllm import VllmEstimate
    from nbinfer.models.stores import FoundModel
    from nbinfer.widgets.state import Row

    AnyEstimate: TypeAlias = Estimate | VllmEstimate | ImageEstimate

KV_TYPES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What the panel offers, from exact to small."""
VLLM_ONLY = ("gpu_memory_utilization", "kv_cache_bytes")
"""Settings that only a piece of advice for vLLM sets."""
_USUAL: Row = {
    "context_size": None,
    "kv_type": "f16",
    "gpu_layers": -1,
    "experts_on_cpu": False,
    "parallel": None,
    **dict.fromkeys(VLLM_ONLY),
}
LONGEST_UNKNOWN = 32768
MOST_AT_ONCE = 16
_STEPS_PER_DOUBLING = 4
_CELLS = 256
_HIGH, _FULL = 0.8, 0.93
_FRESH_SECONDS = 2.0

VERDICT_KINDS = {"fits": "ok", "tight": "warn", "does not fit": "error"}
"""The colour of a verdict."""


class Planner(Protocol):
    """Answers about memory, as parts of a widget's state."""

    def machine(self) -> Row:
        """Return a row for main memory and for each GPU, and a text where something cannot be told."""
        ...

    def verdict(self, model: FoundModel) -> Row:
        """Return ``word`` and ``kind`` for a model with its default settings."""
        ...

    def quick(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return a plan by formula, at once; ``settings`` may lack some, the plan's are whole.

        Raises
        ------
        NbinferError
            There is no such model, or it cannot be read or planned.
        """
        ...

    def exact(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return the plan that llama.cpp itself makes; may take a while.

        Raises
        ------
        NbinferError
            It cannot be asked here; the message says why.
        """
        ...

    def around(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return what lies around a plan; may take longest.

        ``advice`` are the nearest settings that fit; ``curve`` the bars, by formula, at every stop of the
        context slider.

        Raises
        ------
        NbinferError
            As the others.
        """
        ...

    def load_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of :func:`nbinfer.session.load` for a plan's settings."""
        ...


def context_stops(longest: int) -> list[int]:
    """Return where a context slider stops: four times in each doubling, and at ``longest``."""
    stops, step = [], 0
    while (stop := 512 * 2 ** (step / _STEPS_PER_DOUBLING)) < longest:
        stops.append(round(stop / _CELLS) * _CELLS)
        step += 1
    return list(dict.fromkeys([*(stop for stop in stops if stop < longest), longest]))


def machine_part(machine: Machine) -> Row:
    """Return a machine's memory as bars."""
    ram = machine.ram
    limit = f" (limit: {ram.limit})" if ram.limit else ""
    rows = [_device_row("ram", f"RAM{limit}", ram.total - ram.available, ram.total)]
    for gpu in machine.gpus:
        name = f"GPU {gpu.index}, {gpu.name}" + (" (shares RAM)" if gpu.unified else "")
        rows.append(_device_row(f"gpu{gpu.index}", name, gpu.used, gpu.total))
    return {"rows": rows, "text": f"GPU: {machine.gpu_status}" if machine.gpu_status else ""}


def _device_row(key: str, name: str, used: int, total: int) -> Row:
    part = used / total if total else 0.0
    kind = "error" if part > _FULL else "warn" if part > _HIGH else "ok"
    text = f"{words.part_of(used, total)} used"
    return {"key": key, "name": name, "used": used, "total": total, "text": text, "kind": kind}


def whole_settings(settings: Mapping[str, Any], limits: Row) -> Row:
    """Return a plan's settings, all of them, each within its limits.

    They come from a page, so nothing about them is taken for granted.
    """
    context = None
    if limits["context"]:  # an image model has none
        longest = limits["context"][-1]
        context = _number(settings.get("context_size"), 1, longest, min(defaults.CONTEXT, longest))
    kv_type = settings.get("kv_type")
    at_once = settings.get("parallel") if limits["parallel"] else None
    return {
        "context_size": context,
        "kv_type": kv_type if kv_type in limits["kv_types"] else "f16",
        "gpu_layers": _number(settings.get("gpu_layers"), -1, limits["layers"], -1),
        "parallel": None if at_once is None else _number(at_once, 1, limits["parallel"], 1),
    }


def _number(value: Any, least: int, most: int, usual: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return max(least, min(most, value)) if whole else usual


class MemoryPlanner:
    """The planner of this machine; may be asked from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._base: tuple[str, float, Estimate] | None = None
        self._advice: tuple[str, list[Row]] = ("", [])

    def machine(self) -> Row:
        """Return main memory and GPUs as they are now."""
        from nbinfer.memory import machine

        return machine_part(machine())

    def verdict(self, model: FoundModel) -> Row:
        """Return whether a model fits with its default settings, by formula; no word without one."""
        from nbinfer.gguf import Header
        from nbinfer.gguf.pipeline import PipelineHeader
        from nbinfer.memory import estimate, estimate_images

        header = model.header
        try:
            if isinstance(header, PipelineHeader):
                found = estimate_images(header).verdict
            elif isinstance(header, Header):
                found = estimate(header, projector=model.projector, exact=False).verdict
            else:
                return {"word": "", "kind": ""}
        except NbinferError:
            return {"word": "", "kind": ""}
        return {"word": found, "kind": VERDICT_KINDS[found]}

    def quick(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return a plan by formula; about a millisecond once the model is known."""
        return self._answer(ref, settings, exact=False)

    def exact(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return the plan that llama.cpp itself makes: some 10 ms, once its process is there."""
        return self._answer(ref, settings, exact=True)

    def _answer(self, ref: str, settings: Mapping[str, Any], *, exact: bool) -> Row:
        try:
            base = self._model(ref)
        except (NotSupported, GGUFParseError) as problem:
            return _other(ref, settings, problem)
        whole = _whole(settings, base)
        plan = _plan(base, base.again(**_options(whole), exact=exact), whole)
        known, advice = self._advice
        if known == ref and plan["verdict"]["kind"] == "error":
            plan["advice"] = advice  # until there is new
        return plan

    def around(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return advice, and the curve over the context."""
        try:
            base = self._model(ref)
        except (NotSupported, GGUFParseError) as problem:
            return {"advice": _other(ref, settings, problem)["advice"], "curve": []}
        whole = _whole(settings, base)
        found = base.again(**_options(whole)).advice()
        self._advice = ref, [{"label": one.text, "settings": dict(one.changes)} for one in found]
        return {"advice": self._advice[1], "curve": _curve(base, whole)}

    def load_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of :func:`nbinfer.session.load`: only what differs from its defaults."""
        return {key: settings[key] for key, usual in _USUAL.items() if settings.get(key, usual) != usual}

    def _model(self, ref: str) -> Estimate:
        """Return a model's estimate to start from; it knows what was free a moment ago."""
        from nbinfer.memory import Estimate, estimate

        with self._lock:
            if self._base is not None:
                known, at, base = self._base
                if known == ref and time.monotonic() - at < _FRESH_SECONDS:
                    return base
            base = estimate(session.session.aliases.get(ref, ref), exact=False)
            if not isinstance(base, Estimate):
                raise NotSupported(f"{ref} is no model of llama.cpp's.")
            self._base = ref, time.monotonic(), base
            return base


def _whole(settings: Mapping[str, Any], base: Estimate) -> Row:
    # Set by a piece of advice; it has no slider.
    experts = settings.get("experts_on_cpu") is True
    return {**whole_settings(settings, _limits(base)), "experts_on_cpu": experts}


def _options(whole: Row) -> dict[str, Any]:
    return {
        key: whole[key] for key in ("context_size", "kv_type", "gpu_layers", "experts_on_cpu", "parallel")
    }


def _limits(base: Estimate) -> Row:
    """Return what the sliders can be set to."""
    return {
        "context": context_stops(base.trained_context_size or LONGEST_UNKNOWN),
        "kv_types": list(KV_TYPES),
        "layers": (base.header.n_layers or 0) + 1 if base.gpus else 0,
        "parallel": MOST_AT_ONCE,
    }


def _plan(base: Estimate, estimate: Estimate, whole: Row) -> Row:
    source = "exact: llama.cpp's own plan" if estimate.exact else "by formula"
    return {
        "name": base.model,
        "settings": whole,
        "limits": _limits(base),
        **picture(estimate),
        "advice": [],
        "source": f"{source}. {words.short(estimate.note)}" if estimate.note else source,
    }


def picture(estimate: AnyEstimate) -> Row:
    """Return ``bars`` of the devices, ``segments`` summed over them for a legend, and the ``verdict``."""
    bars = _bars(estimate)
    sums: dict[str, Row] = {}
    for device in estimate.devices:
        for part, label, size in _parts(device):
            known = sums.get(part, {"bytes": 0})
            sums[part] = _segment(part, label, known["bytes"] + size)
    text = estimate.reason.removeprefix(estimate.verdict).removeprefix(": ")
    verdict = {
        "word": estimate.verdict,
        "kind": VERDICT_KINDS[estimate.verdict],
        "text": text or _needs(estimate),
    }
    return {"bars": bars, "segments": list(sums.values()), "verdict": verdict}


def _needs(estimate: AnyEstimate) -> str:
    return "; ".join(
        f"{human_bytes(device.required)} of {human_bytes(device.available)} free on {device.name}"
        for device in estimate.devices
        if _holds(device)
    )


def _bars(estimate: AnyEstimate) -> list[Row]:
    return [_bar(f"d{i}", device) for i, device in enumerate(estimate.devices) if _holds(device) or i == 0]


def _holds(device: Any) -> bool:
    """Whether some of the model is on a device; what llama.cpp's libraries take there does not count."""
    return bool(device.known)


def _bar(key: str, device: Any) -> Row:
    """Return one device: what is taken by others, what the model adds, and what there is."""
    segments = [_segment(*part) for part in _parts(device)]
    return {
        "key": key,
        "name": device.name,
        "used": sum(each["bytes"] for each in segments),
        "total": device.total,
        "text": f"needs {human_bytes(device.required)}, free {human_bytes(device.available)}",
        "kind": "",
        "segments": segments,
    }


def _parts(device: Any) -> list[tuple[str, str, int]]:
    return [("taken", "in use now", max(0, device.total - device.available)), *parts(device)]


def _segment(part: str, label: str, size: int) -> Row:
    return {"key": part, "kind": part, "bytes": size, "text": f"{label} {human_bytes(size)}"}


def _curve(base: Estimate, whole: Row) -> list[list[Row]]:
    """Return the bars at every stop of the context slider."""
    stops = _limits(base)["context"]
    options = _options(whole)
    return [_bars(base.again(**{**options, "context_size": stop}, exact=False)) for stop in stops]


def _other(ref: str, settings: Mapping[str, Any], problem: NbinferError) -> Row:
    """Return a plan of a model that llama.cpp does not run, or whose memory cannot be told."""
    from nbinfer.widgets import others

    return others.plan(ref, settings, problem)
