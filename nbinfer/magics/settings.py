"""What ``%config NbInfer`` can set."""

from __future__ import annotations

from typing import Any

from traitlets import Bool, Enum, Unicode, observe
from traitlets.config import Configurable

from nbinfer.contract.errors import NbinferError
from nbinfer.display.result import VIEWS
from nbinfer.session import settings


class NbInfer(Configurable):
    """Settings of the magics; the class's name is what ``%config`` calls them."""

    model = Unicode(None, allow_none=True, help="name of the model that is meant when none is named").tag(
        config=True
    )
    format = Enum(VIEWS, "rich", help="how answers are shown").tag(config=True)
    footer = Bool(True, help="a line under each answer: model, tokens, speed, end").tag(config=True)
    stream = Bool(True, help="show answers while they grow").tag(config=True)
    display = Enum(
        ("auto", "rich", "plain"),
        "auto",
        help="rich updates one output in place, plain prints; auto is plain in a terminal. "
        "Set plain for a console on a kernel, which cannot update",
    ).tag(config=True)
    full_tracebacks = Bool(False, help="show whole tracebacks of nbinfer's errors").tag(config=True)

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.model is None:
            self.model = settings.model
        # %config writes to the same place later.
        self._configured = dict(self.config.get("NbInfer", {}))
        # A configuration file sets values before anybody observes them.
        settings.model = self.model
        NbinferError.full_tracebacks = self.full_tracebacks

    @observe("model")
    def _model_changed(self, change: Any) -> None:
        settings.model = change["new"] or None

    @observe("full_tracebacks")
    def _full_tracebacks_changed(self, change: Any) -> None:
        NbinferError.full_tracebacks = change["new"]

    def rows(self) -> list[dict[str, str]]:
        """Return each setting, its value and where the value comes from."""
        rows = []
        for name, trait in sorted(self.traits(config=True).items()):
            value = settings.model if name == "model" else getattr(self, name)
            if name in self._configured and self._configured[name] == value:
                source = "configuration"
            else:
                source = "default" if value == trait.default() else "set here"
            rows.append(
                {"setting": f"NbInfer.{name}", "value": repr(value), "source": source, "help": trait.help}
            )
        return rows
