"""A planner whose answers can be worked out by hand, for tests of what is drawn and when."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ModelNotFound
from nbinfer.contract.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

GIB = 2**30
TOTAL = 8 * GIB
STOPS = [512 * 2**i for i in range(8)]
ADVICE = [{"label": "context 16,384", "settings": {"context_size": 16384}}]
PER_TOKEN = {"f16": 65536, "q8_0": 34816}


class FakePlanner:
    """A machine with one GPU of 8 GiB, and models with 4 GiB of weights.

    Attributes
    ----------
    asked
        The calls, as (kind, settings).
    go
        Cleared, it holds exact answers back.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.used = 3 * GIB
        self.go = threading.Event()
        self.go.set()

    def machine(self) -> dict[str, Any]:
        def row(key: str, name: str, used: int, total: int) -> dict[str, Any]:
            text = f"{human_bytes(used)} of {human_bytes(total)} used"
            return {"key": key, "name": name, "used": used, "total": total, "text": text, "kind": "ok"}

        rows = [row("ram", "RAM", self.used, 16 * GIB), row("gpu0", "GPU 0, Imaginary 8", GIB, TOTAL)]
        return {"rows": rows, "text": ""}

    def verdict(self, model: Any) -> dict[str, Any]:
        return {"word": "fits", "kind": "ok"}

    def quick(self, ref: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        return self._plan("quick", ref, settings, "by formula")

    def exact(self, ref: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        self.go.wait(20)
        return self._plan("exact", ref, settings, "exact: llama.cpp's own plan")

    def around(self, ref: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        curve = [[self._bar({**settings, "context_size": stop})[0]] for stop in STOPS]
        return {"advice": self._plan("around", ref, settings, "")["advice"], "curve": curve}

    def load_options(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"context_size": settings.get("context_size")}

    def _plan(self, kind: str, ref: str, settings: Mapping[str, Any], source: str) -> dict[str, Any]:
        if ref == "nowhere":
            raise ModelNotFound("there is no model 'nowhere'.")
        whole = {"context_size": 4096, "kv_type": "f16", "gpu_layers": -1, "parallel": None, **settings}
        self.asked.append((kind, whole))
        bar, segments = self._bar(whole)
        fits = bar["used"] <= TOTAL
        word, mark = ("fits", "ok") if fits else ("does not fit", "error")
        return {
            "name": ref,
            "settings": whole,
            "limits": {"context": STOPS, "kv_types": list(PER_TOKEN), "layers": 33, "parallel": 16},
            "bars": [bar],
            "segments": segments,
            "verdict": {"word": word, "kind": mark, "text": f"{bar['text']} of the GPU"},
            "advice": [] if fits else ADVICE,
            "source": source,
        }

    def _bar(self, whole: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        sizes = {
            "taken": GIB,
            "weights": 4 * GIB,
            "cache": PER_TOKEN[whole["kv_type"]] * whole["context_size"] * (whole["parallel"] or 1),
            "compute": GIB // 4,
        }
        segments = [
            {"key": name, "kind": name, "bytes": size, "text": f"{name} {human_bytes(size)}"}
            for name, size in sizes.items()
        ]
        used = sum(sizes.values())
        text = f"{human_bytes(used)} of {human_bytes(TOTAL)}"
        bar = {"key": "gpu0", "name": "GPU 0, Imaginary 8", "used": used, "total": TOTAL, "text": text}
        return {**bar, "kind": "", "segments": segments}, segments
