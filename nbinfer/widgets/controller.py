"""What the panel does: commands in, state out. Knows nothing of widgets, so that it can be tested alone."""

from __future__ import annotations

import time
from itertools import count
from typing import TYPE_CHECKING, Any

from nbinfer import session
from nbinfer.contract.errors import NbinferError
from nbinfer.widgets import looks, words
from nbinfer.widgets.lanes import Lane
from nbinfer.widgets.state import EMPTY
from nbinfer.widgets.ticks import MONITOR
from nbinfer.widgets.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.widgets.planner import Planner
    from nbinfer.widgets.state import Parts, Row
    from nbinfer.widgets.ticks import Monitor
    from nbinfer.widgets.watched import Pulse

_MOST_MESSAGES = 5


class Controller(Watched):
    """The state of a panel, and what its commands do.

    Parameters
    ----------
    planner
        Answers how much memory a model takes, and what there is.
    monitor
        Says when to look at the models and the machine; it does so only while a view is open.
    pulse
        Whether the kernel hears its buttons.
    settle_seconds
        How long a slider has rested when the exact answer is asked for.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        monitor: Monitor = MONITOR,
        pulse: Pulse | None = None,
        settle_seconds: float = 0.06,
    ) -> None:
        self._planner = planner
        self._settle_seconds = settle_seconds
        self._rates = looks.Rates()
        self._requests = looks.Requests()
        self._crashes = looks.Crashes()
        self._numbers = count(1)
        self._newest_plan = 0
        super().__init__(EMPTY, self._parts_now, monitor=monitor, pulse=pulse)
        # Sliders must not wait for the exact answer, and neither for a load.
        self._fast = Lane("nbinfer-panel", self._complain)
        self._exact = Lane("nbinfer-panel-exact", self._complain)
        self._slow = Lane("nbinfer-panel-work", self._complain)

    # -- from the page ------------------------------------------------------------------------------------

    def do(self, command: Mapping[str, Any]) -> None:
        """Take a command of the page; returns at once, on whatever thread it is called.

        Besides those of every widget: ``{"do": "plan", "ref": …, "settings": {…}, "seq": n}``, ``load``
        (``ref``, ``settings``, ``where``, ``keep_alive``, ``force``), ``unload`` (``name``), ``stop``
        (``id``), ``refresh`` and ``dismiss`` (``id``). Anything else is ignored: the page may be newer than
        the kernel.
        """
        super().do(command)
        row = dict(command)
        match row.get("do"):
            case "plan":
                self._newest_plan += 1
                number = self._newest_plan
                self._fast.put(lambda: self._plan(number, row), key="plan")
            case "stop":  # not behind a plan: that may have to ask a server
                self._quick.put(lambda: self._stop(row))
            case "dismiss":
                self._quick.put(lambda: self._dismiss(row))
            case "refresh":
                self._slow.put(self.look_around, key="refresh")
            case "load":
                self._slow.put(lambda: self._load(row))
            case "unload":
                self._slow.put(lambda: self._unload(row))

    def close(self) -> None:
        """Stop looking; commands are ignored from now on. Idempotent. A load that is under way ends."""
        super().close()
        for lane in (self._fast, self._exact, self._slow):
            lane.close()

    def say(self, text: str, *, kind: str = "ok", log: str = "") -> None:
        """Add a message: ``log`` is the tail of a process's log, shown when asked for."""
        row = {"id": f"m{next(self._numbers)}", "kind": kind, "text": text, "log": log}
        rows = [each for each in self.state["messages"]["rows"] if each["text"] != text]
        self.state.set(messages={"rows": [*rows, row][-_MOST_MESSAGES:]})

    def _complain(self, error: Exception) -> None:
        # One of our errors says itself what to do; any other is named.
        text = str(error) if isinstance(error, NbinferError) else f"{type(error).__name__}: {error}"
        self.say(text, kind="error", log=str(getattr(error, "log", "") or ""))

    # -- looking ------------------------------------------------------------------------------------------

    def _parts_now(self) -> Parts:
        for text, log in self._crashes.new():
            self.say(text, kind="error", log=log)
        return {
            "machine": self._planner.machine(),
            "loaded": looks.loaded(self._rates),
            "requests": self._requests.part(),
        }

    def look_around(self) -> None:
        """Look at what does not change by itself: the backends, and the models on this disk."""
        self.state.change("models", busy=True)
        try:
            self.state.set(backends=looks.backends())
            self.state.set(models=looks.models(self._planner.verdict))
        finally:
            self.state.change("models", busy=False)

    # -- commands -----------------------------------------------------------------------------------------

    def plan(self, ref: str, settings: Mapping[str, Any]) -> None:
        """Plan a model now, with the exact answer where there is one.

        Raises
        ------
        NbinferError
            There is no such model, or it cannot be read or planned.
        """
        self._newest_plan += 1
        number = self._newest_plan
        self._settle(number, ref, 0, self._show_plan(ref, settings, 0))

    def _show_plan(self, ref: str, settings: Mapping[str, Any], seq: int) -> Row:
        """Show the formulas' answer; return the whole settings."""
        plan = self._planner.quick(ref, settings)
        self.state.set(plan={**plan, "ref": ref, "seq": seq, "settling": True, "error": ""})
        whole: Row = plan["settings"]
        return whole

    def _plan(self, number: int, row: Row) -> None:
        ref, seq = str(row.get("ref", "")), row.get("seq", 0)
        try:
            settings = self._show_plan(ref, row.get("settings") or {}, seq)
        except NbinferError as error:
            self.state.set(plan={"ref": ref, "seq": seq, "error": str(error), "settling": False})
            return

        def settle() -> None:
            time.sleep(self._settle_seconds)
            self._settle(number, ref, seq, settings)

        self._exact.put(settle, key="settle")

    def _settle(self, number: int, ref: str, seq: int, settings: Row) -> None:
        if number != self._newest_plan or self.closed:
            return
        try:
            plan = {**self._planner.exact(ref, settings), "ref": ref, "seq": seq, "error": ""}
        except NbinferError as error:  # the formulas' answer stands
            plan = {**self.state["plan"], "source": f"by formula. {words.short(str(error))}"}
        if number != self._newest_plan:
            return
        self.state.set(plan={**plan, "settling": False})
        try:
            around = self._planner.around(ref, settings)
        except NbinferError:  # the plan itself says what is wrong
            around = {"advice": [], "curve": []}
        of = {key: settings[key] for key in ("kv_type", "gpu_layers", "parallel")}
        # The curve is large and changes seldom: it is a part by itself, not sent with every move of a slider.
        self.state.set(curve={"of": {"ref": ref, **of}, "rows": around["curve"]})
        if number == self._newest_plan:
            self.state.change("plan", advice=around["advice"])

    def _load(self, row: Row) -> None:
        ref = str(row.get("ref", ""))
        options = self._planner.load_options(row.get("settings") or {})
        name = words.short(ref)

        def progress(fraction: float) -> None:
            text = f"loading {name}: {fraction:.0%}"
            self.state.set(loading={"ref": ref, "fraction": round(fraction, 2), "text": text})

        progress(0.0)
        try:
            model = session.load(
                ref,
                where="sidecar" if row.get("where") == "sidecar" else "kernel",
                keep_alive=row.get("keep_alive") or None,
                force=bool(row.get("force")),
                progress=progress,
                **options,
            )
        finally:
            self.state.set(loading={})
        self.say(f"{model.name} is loaded; it took {words.took(model.load_seconds)}.")
        self.look()

    def _unload(self, row: Row) -> None:
        try:
            session.unload(str(row.get("name", "")))
        finally:
            self.look()

    def _stop(self, row: Row) -> None:
        if self._requests.stop(str(row.get("id", ""))):
            self.state.set(requests=self._requests.part())

    def _dismiss(self, row: Row) -> None:
        rows = [each for each in self.state["messages"]["rows"] if each["id"] != row.get("id")]
        self.state.set(messages={"rows": rows})
