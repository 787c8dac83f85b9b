"""Every backend there is: the built-in ones, and those that other distributions bring.

A distribution adds a backend with an entry point in the group ``nbinfer.backends``: the entry point's name is
the backend's, its value a class or function that makes the adapter, or the adapter itself. A broken one is a
backend whose status says so; it never breaks the others.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, NoReturn

from nbinfer.contract import status as words
from nbinfer.contract.errors import BackendUnavailable, ConfigError, NbinferError, NotSupported
from nbinfer.contract.status import BackendStatus, StatusWord

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbinfer.backends.protocol import Backend

GROUP = "nbinfer.backends"
BUILT_IN = {
    "llamacpp": "nbinfer.backends.llamacpp:LlamaCppBackend",
    "llama-server": "nbinfer.backends.llama_server:LlamaServerBackend",
    "vllm": "nbinfer.backends.vllm:VllmBackend",
    "diffusers": "nbinfer.backends.diffusers:DiffusersBackend",
    "openai": "nbinfer.backends.openai:OpenAIBackend",
}
# A name is part of URLs and of socket paths, which hold 100 characters or so in all.
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,30}[a-z0-9])?")
_MEMBERS = (
    "name",
    "formats",
    "allowed_flags",
    "uses_external_model_management",
    "uses_tcp",
    "status",
    "advice",
    "install",
    "open",
    "run",
    "disk_usage",
)


def check_name(name: object) -> str:
    """Return ``name`` when it can be a backend's: lower-case letters, digits, inner dots and hyphens.

    Raises
    ------
    ConfigError
        It cannot.
    """
    if isinstance(name, str) and _NAME.fullmatch(name) and ".." not in name:
        return name
    raise ConfigError(
        f"{name!r:.60} cannot name a backend: it takes 1 to 32 lower-case letters, digits, dots and hyphens, "
        "with a letter or digit at both ends.",
    )


class BrokenBackend:
    """Stands for a backend that could not be made."""

    formats: tuple[str, ...] = ()
    allowed_flags: frozenset[str] = frozenset()
    uses_external_model_management = False
    uses_tcp = False

    def __init__(self, name: str, detail: str, reason: str) -> None:
        self.name = name
        self._detail = detail
        self._reason = reason

    def status(self) -> BackendStatus:
        """Return the error."""
        return BackendStatus(StatusWord.ERROR, self._detail)

    def advice(self) -> str:
        """Return what went wrong, and where."""
        return self._reason

    def install(self) -> NoReturn:
        """Raise ``BackendUnavailable`` with what went wrong."""
        raise BackendUnavailable(f"{self.name}: {self.status()}\n{self._reason}")

    def open(self, path: Path, **options: Any) -> NoReturn:
        """Raise ``BackendUnavailable`` with what went wrong."""
        del path, options
        self.install()

    def run(self, *arguments: Any, **named: Any) -> NoReturn:
        """Raise ``BackendUnavailable`` with what went wrong."""
        del arguments, named
        self.install()

    def disk_usage(self) -> int:
        """Return 0: nothing of it is known."""
        return 0


def backends() -> dict[str, Backend]:
    """Return all backends by name, the built-in ones first. Found once; see :func:`refresh`."""
    return dict(_found())


def refresh() -> None:
    """Look for backends again, after a distribution was installed into this running process."""
    _found.cache_clear()


def get(name: str) -> Backend:
    """Return a backend by name.

    Raises
    ------
    ConfigError
        There is none of that name; the message lists them.
    """
    known = _found()
    if name in known:
        return known[name]
    near = get_close_matches(str(name).lower(), known, n=1)
    advice = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"there is no backend {name!r:.60}.{advice}\nBackends: {', '.join(known)}.")


def for_format(kind: str, name: str | None = None) -> Backend:
    """Choose the backend that runs files of a format.

    Parameters
    ----------
    kind
        The format: ``gguf``, ``safetensors``.
    name
        The backend that was asked for; None takes the first one that is usable.

    Raises
    ------
    ConfigError
        There is no backend of that name.
    NotSupported
        The backend that was asked for, or every one, runs other formats.
    BackendUnavailable
        None that could run it is usable here; the message is the exact install line.
    """
    candidates = [backend for backend in _found().values() if kind in backend.formats]
    if name is not None:
        asked = get(name)
        if asked not in candidates and asked.formats:
            others = ", ".join(backend.name for backend in candidates)
            raise NotSupported(
                f"{asked.name} runs {', '.join(asked.formats)} files; this model is {kind}."
                + (f" Use backend={others}." if others else ""),
            )
        candidates = [asked]
    if not candidates:
        formats = sorted({each for backend in _found().values() for each in backend.formats})
        raise NotSupported(f"no backend runs {kind} files; there are backends for {', '.join(formats)}.")
    for backend in candidates:
        if _status(backend).usable:
            return backend
    first = candidates[0]
    raise BackendUnavailable(f"{first.name}: {_status(first)}\n{_advice(first)}")


def statuses() -> list[tuple[str, BackendStatus, str]]:
    """Return name, status and advice of every backend; the usable ones first, then by name.

    The advice is the exact command, or the step, that would make it usable or faster; empty: none is needed.
    """
    order = list(StatusWord)
    rows = [(name, _status(backend), _advice(backend)) for name, backend in _found().items()]
    return sorted(rows, key=lambda row: (order.index(row[1].word), row[0]))


def _status(backend: Backend) -> BackendStatus:
    try:
        found: object = backend.status()
    except Exception as error:  # noqa: BLE001 - one broken adapter must not hide the others
        return BackendStatus(StatusWord.ERROR, _one_line(error))
    # An adapter of another distribution may well answer in text.
    return found if isinstance(found, BackendStatus) else BackendStatus.parse(str(found))


def _advice(backend: Backend) -> str:
    try:
        return str(backend.advice())
    except Exception as error:  # noqa: BLE001 - as above
        return _one_line(error)


@cache
def _found() -> dict[str, Backend]:
    found = {name: _make(name, _load_path(value), "nbinfer") for name, value in BUILT_IN.items()}
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    for point in points:
        # A name that is taken stays with its first owner: nothing replaces a built-in backend unseen.
        if point.name not in found:
            owner = point.dist.name if point.dist is not None else point.value
            found[point.name] = _make(point.name, point.load, owner)
    return found


def _load_path(value: str) -> Callable[[], Any]:
    def load() -> Any:
        module, _, attribute = value.partition(":")
        return getattr(import_module(module), attribute)

    return load


def _make(name: str, load: Callable[[], Any], owner: str) -> Backend:
    try:
        check_name(name)
        made = load()
        backend: Any = made() if isinstance(made, type) or not hasattr(made, "status") else made
    except ConfigError as error:
        return BrokenBackend(name, "bad name", f"{owner}: {error}")
    # A module that calls sys.exit when imported must not end the kernel.
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a stranger's module raises
        return BrokenBackend(name, words.IMPORT_FAILED, f"{owner}: {_one_line(error)}")
    missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    if missing:
        return BrokenBackend(name, "not a backend", f"{owner}: it has no {', '.join(missing)}.")
    if backend.name != name:
        return BrokenBackend(
            name, "bad name", f"{owner}: registered as {name}, it calls itself {backend.name!r:.60}."
        )
    checked: Backend = backend
    return checked


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{text[:200]}" if isinstance(error, NbinferError) else f"{type(error).__name__}: {text[:200]}"
