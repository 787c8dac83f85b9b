"""What ``%config NbInfer`` can set, and where each value comes from."""

from __future__ import annotations

from typing import Any

from traitlets import Bool, Enum, Unicode, observe
from traitlets.config import Configurable

from nbinfer.contract.errors import NbinferError
from nbinfer.contract.settings import SETTINGS, configured
from nbinfer.display.result import VIEWS
from nbinfer.session import settings

_HELP = {setting.name: setting.help for setting in SETTINGS}
_MAGICS = [setting for setting in SETTINGS if setting.magics]


class NbInfer(Configurable):
    """Settings of the magics; the class's name is what ``%config`` calls them."""

    model = Unicode(None, allow_none=True, help=_HELP["model"]).tag(config=True)
    format = Enum(VIEWS, "rich", help=_HELP["format"]).tag(config=True)
    footer = Bool(True, help=_HELP["footer"]).tag(config=True)
    stream = Bool(True, help=_HELP["stream"]).tag(config=True)
    display = Enum(("auto", "rich", "plain"), "auto", help=_HELP["display"]).tag(config=True)
    full_tracebacks = Bool(False, help=_HELP["full_tracebacks"]).tag(config=True)

    def __init__(self, **arguments: Any) -> None:
        before = settings.explicit
        super().__init__(**arguments)
        in_ipython = set(self.config.get("NbInfer", {}))
        self._came: dict[str, tuple[Any, str]] = {}
        for setting in _MAGICS:
            found = configured(setting.name)
            of_environment = found.source.startswith("environment")
            if setting.name in in_ipython and not of_environment:
                self._came[setting.name] = (getattr(self, setting.name), "IPython's configuration")
            else:
                setattr(self, setting.name, found.value)
                self._came[setting.name] = (found.value, found.source)
        if before is not None:  # a name set in Python before the magics came
            self.model = before
        # The default of Python's calls is the same; what the environment or a file says they read themselves.
        elif not self._came["model"][1].startswith("IPython"):
            settings.model = None
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
        for setting in sorted(SETTINGS, key=lambda setting: setting.name):
            if setting.magics:
                name = f"NbInfer.{setting.name}"
                value = settings.model if setting.name == "model" else getattr(self, setting.name)
                came, source = self._came[setting.name]
                source = source if came == value else "set here"
            else:
                found = configured(setting.name)
                name, value, source = setting.name, found.value, found.source
            shown = "" if value is None else repr(value)
            rows.append({"setting": name, "value": shown, "source": source, "help": setting.help})
        return rows
