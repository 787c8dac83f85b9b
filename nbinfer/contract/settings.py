"""What can be set outside a notebook, where it is read from, and which place wins.

From the strongest: an option of a cell or call, ``%config NbInfer.…`` (or an assignment in Python), the
environment (``NBINFER_MODEL``), IPython's own configuration file, ``[tool.nbinfer]`` in the nearest
``pyproject.toml`` that has it (upward from the working directory), the user's ``config.toml``, the default.

Files are read when a value is asked for, and again only after they have changed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from nbinfer.contract.errors import ConfigError

PREFIX = "NBINFER_"
TABLE = "[tool.nbinfer]"
USER_FILE = "config.toml"

_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NEAR = 0.7  # how much a variable must look like one of ours to be taken for a typing mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting. ``choices`` are the words it may be; ``magics``: whether ``%config NbInfer`` has it."""

    name: str
    kind: Literal["text", "bool", "path", "bytes"]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    magics: bool = True

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return PREFIX + self.name.upper()


SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="model", kind="text", default=None, help="name of the model that is meant when none is named"
    ),
    Setting(
        name="format",
        kind="text",
        default="rich",
        help="how answers are shown",
        choices=("rich", "text", "code", "json", "html"),
    ),
    Setting(
        name="footer",
        kind="bool",
        default=True,
        help="a line under each answer: model, tokens, speed, end",
    ),
    Setting(name="stream", kind="bool", default=True, help="show answers while they grow"),
    Setting(
        name="display",
        kind="text",
        default="auto",
        help="rich updates one output in place, plain prints; auto is plain in a terminal",
        choices=("auto", "rich", "plain"),
    ),
    Setting(
        name="full_tracebacks",
        kind="bool",
        default=False,
        help="show whole tracebacks of nbinfer's errors",
    ),
    Setting(
        name="cache",
        kind="path",
        default=None,
        help="folder for converted models and the results journal",
        magics=False,
    ),
    Setting(
        name="journal_bytes",
        kind="bytes",
        default=None,
        help="size of the results journal at which the oldest results go",
        magics=False,
    ),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Configured:
    """A value, and where it comes from: ``default``, ``environment: …``, ``project: …`` or ``user: …``."""

    value: Any
    source: str = "default"


def configured(name: str) -> Configured:
    """Return what a setting is outside the notebook.

    Raises
    ------
    ConfigError
        A value is not what the setting takes, or a place names a setting that there is not.
    """
    setting = _BY_NAME[name]
    _check_environment()
    text = os.environ.get(setting.variable)
    if text:
        return Configured(_from_text(setting, text), f"environment: {setting.variable}")
    for place, path, values in _files():
        if name in values:
            return Configured(values[name], f"{place}: {path}")
    return Configured(setting.default)


def configured_aliases() -> dict[str, str]:
    """Return the short names of models in ``[tool.nbinfer.aliases]``; the project's win over the user's.

    A reference that is a file beside the ``pyproject.toml`` is that file, wherever the notebook is.
    """
    found: dict[str, str] = {}
    for _, path, values in reversed(_files()):
        for name, ref in values.get("aliases", {}).items():
            beside = path.parent / Path(ref).expanduser()
            found[name] = str(beside) if _is_file(beside) else ref
    return found


def sources() -> list[str]:
    """Return the places that set something, in words: for a report."""
    variables = [setting.variable for setting in SETTINGS if os.environ.get(setting.variable)]
    files = [f"{place}: {path}" for place, path, values in _files() if values]
    return ([f"environment: {', '.join(variables)}"] if variables else []) + files


# -- places -------------------------------------------------------------------------------------------------


def _files() -> list[tuple[str, Path, Mapping[str, Any]]]:
    """(place, path, values) of the project's and the user's file, the stronger first."""
    found = []
    project = _project()
    if project is not None:
        found.append(("project", *project))
    import platformdirs

    user = Path(platformdirs.user_config_dir("nbinfer", appauthor=False)) / USER_FILE
    if _is_file(user):
        found.append(("user", user, _read(user, _stamp(user), in_project=False) or {}))
    return found


def _project() -> tuple[Path, Mapping[str, Any]] | None:
    try:
        here = Path.cwd()
    except OSError:  # the folder is gone
        return None
    for folder in (here, *here.parents):
        path = folder / "pyproject.toml"
        if _is_file(path):
            values = _read(path, _stamp(path), in_project=True)
            if values is not None:
                return path, values
    return None


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - pathlib raises where a folder may not be looked into


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=16)
def _read(path: Path, _stamp: tuple[int, int], *, in_project: bool) -> Mapping[str, Any] | None:
    """Return the checked settings of a file; None for a project's file that has none of ours."""
    import tomllib

    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        whole = tomllib.loads(text)
    except (OSError, ValueError) as error:
        if in_project and "tool.nbinfer" not in text:
            return None  # broken, and not for us
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not in_project:
        return _checked(whole, str(path))
    tools = whole.get("tool", {})
    if not isinstance(tools, Mapping) or "nbinfer" not in tools:
        return None
    return _checked(tools["nbinfer"], f"{TABLE} in {path}")


def _checked(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} is not a table of settings.")
    known = [*_BY_NAME, "aliases"]
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name == "aliases":
            if not isinstance(value, Mapping) or not all(isinstance(ref, str) for ref in value.values()):
                raise ConfigError(f"{place}: aliases is not a table of names and references.")
            checked[name] = dict(value)
            continue
        if name not in _BY_NAME:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{place} has no setting {name!r}.{hint}\nSettings: {', '.join(sorted(known))}."
            )
        checked[name] = _value(_BY_NAME[name], value, f"{place}: {name} = {value!r}")
    return checked


def _value(setting: Setting, value: Any, shown: str) -> Any:
    if setting.kind == "bytes":
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    else:
        good = isinstance(value, bool if setting.kind == "bool" else str)
    if not good or (setting.choices and value not in setting.choices):
        words = {"text": "a text", "path": "a path", "bool": "true or false", "bytes": "a number of bytes"}
        wanted = f"one of {', '.join(setting.choices)}" if setting.choices else words[setting.kind]
        raise ConfigError(f"{shown}: it is {wanted}{', at least 1' * (setting.kind == 'bytes')}.")
    return value


def _from_text(setting: Setting, text: str) -> Any:
    value: Any = text
    if setting.kind == "bool" and text.lower() in (*_YES, *_NO):
        value = text.lower() in _YES
    elif setting.kind == "bytes" and text.isdigit():
        value = int(text)
    return _value(setting, value, f"{setting.variable}={text!r}")


def _check_environment() -> None:
    """Refuse a variable that is nearly one of ours.

    Others may begin alike: tests and tools of ours have some.
    """
    for variable in os.environ:
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and name not in _BY_NAME:
            near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=_NEAR)
            if near:
                meant = _BY_NAME[near[0]].variable
                raise ConfigError(f"the environment's {variable} is no setting. Did you mean {meant}?")
