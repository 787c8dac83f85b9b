"""What the widgets ask of the memory room: how much a model takes, and how much there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from nbinfer import session
from nbinfer.contract.errors import NbinferError, NotSupported
from nbinfer.widgets import words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.memory.machine import Machine
    from nbinfer.models.resolve import ResolvedModel
    from nbinfer.models.stores import FoundModel
    from nbinfer.widgets.state import Row

KV_TYPES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What the panel offers, from exact to small."""
_DEFAULT_CONTEXT = 4096
_USUAL: Row = {"context_size": None, "kv_type": "f16", "gpu_layers": -1, "parallel": None}
_LONGEST_UNKNOWN = 32768
_MOST_AT_ONCE = 16
_STEPS_PER_DOUBLING = 4
_CELLS = 256
_HIGH, _FULL = 0.8, 0.93


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
    return {"rows": rows, "text": machine.gpu_status}


def _device_row(key: str, name: str, used: int, total: int) -> Row:
    part = used / total if total else 0.0
    kind = "error" if part > _FULL else "warn" if part > _HIGH else "ok"
    text = f"{words.part_of(used, total)} used"
    return {"key": key, "name": name, "used": used, "total": total, "text": text, "kind": kind}


def whole_settings(settings: Mapping[str, Any], limits: Row) -> Row:
    """Return a plan's settings, all of them, each within its limits.

    They come from a page, so nothing about them is taken for granted.
    """
    longest = limits["context"][-1]
    context = _number(settings.get("context_size"), 1, longest, min(_DEFAULT_CONTEXT, longest))
    kv_type = settings.get("kv_type")
    at_once = settings.get("parallel")
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
    """The planner of this machine."""

    def machine(self) -> Row:
        """Return main memory and GPUs as they are now."""
        return machine_part(self._machine())

    def _machine(self) -> Machine:
        from nbinfer.memory.machine import machine

        return machine()

    def verdict(self, model: FoundModel) -> Row:
        """Return no verdict: this version has no estimate."""
        del model
        return {"word": "", "kind": ""}

    def quick(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return a plan by formula."""
        from nbinfer.models import resolve

        resolved = resolve(ref, aliases=session.session.aliases)
        limits = self._limits(resolved)
        plan: Row = {
            "name": resolved.name,
            "settings": whole_settings(settings, limits),
            "limits": limits,
            "bars": [],
            "segments": [],
            "curve": [],
            "verdict": {"word": "unknown", "kind": "off", "text": ""},
            "advice": [],
            "source": "",
        }
        if resolved.format != "gguf":
            reason = f"there is no estimate for {resolved.format} files yet; it can be loaded without."
        else:
            reason = "there is no estimate in this version; it can be loaded without."
        plan["verdict"]["text"] = reason
        return plan

    def exact(self, ref: str, settings: Mapping[str, Any]) -> Row:
        """Return the plan that llama.cpp itself makes."""
        del ref, settings
        raise NotSupported("no exact number in this version")

    def load_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of :func:`nbinfer.session.load`: only what differs from its defaults."""
        return {key: settings[key] for key, usual in _USUAL.items() if settings.get(key, usual) != usual}

    def _limits(self, resolved: ResolvedModel) -> Row:
        """Return what the sliders can be set to."""
        try:
            header = resolved.header if resolved.format == "gguf" else None
        except NbinferError:
            header = None
        trained = (header.context_length if header is not None else None) or _LONGEST_UNKNOWN
        layers = (header.n_layers or 0) + 1 if header is not None and self._machine().gpus else 0
        return {
            "context": context_stops(trained),
            "kv_types": list(KV_TYPES),
            "layers": layers,
            "parallel": _MOST_AT_ONCE,
        }
