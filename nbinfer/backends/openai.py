"""Servers that already run, and speak OpenAI's API.

llama-server, Ollama, LM Studio, Docker Model Runner, vLLM, or any other. Nothing is loaded, estimated or
stopped here: another program owns the models.
"""

from __future__ import annotations

import os
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nbinfer.contract import status as words
from nbinfer.contract.errors import BackendUnavailable, ConfigError, ModelNotFound, NbinferError, NotSupported
from nbinfer.contract.status import BackendStatus, StatusWord

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nbinfer.backends.process import RunControl
    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.modes import Mode
    from nbinfer.engines.protocol import Engine
    from nbinfer.engines.remote.engine import Endpoint

INSTALL = "pip install 'nbinfer[sidecar]'"
BASE_URL = "OPENAI_BASE_URL"
API_KEY = "OPENAI_API_KEY"
_LIST_SECONDS = 10.0


class OpenAIBackend:
    """A model of a server that already runs."""

    name = "openai"
    formats: tuple[str, ...] = ()
    allowed_flags: frozenset[str] = frozenset()
    uses_external_model_management = True
    uses_tcp = True

    def status(self) -> BackendStatus:
        """Whether the client package is there; servers are not asked."""
        if find_spec("openai") is None:
            return BackendStatus(StatusWord.NOT_INSTALLED, words.PACKAGE_NOT_INSTALLED)
        try:
            version = metadata.version("openai")
        except metadata.PackageNotFoundError:
            version = words.VERSION_UNKNOWN
        return BackendStatus(StatusWord.RUNNING, f"openai {version} (for servers that already run)")

    def advice(self) -> str:
        """Return the command that installs the client."""
        return "" if self.status().usable else INSTALL

    def install(self) -> None:
        """Do nothing when the client is there; else say how to install it.

        Raises
        ------
        BackendUnavailable
            With the exact command.
        """
        if not self.status().usable:
            raise BackendUnavailable(f"{self.name}: {self.status()}\n{INSTALL}")

    def open(
        self,
        path: Path,
        *,
        mode: Mode,
        name: str = "",
        config: ModelConfig | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        socket: str | None = None,
        check: bool = True,
        **options: Any,
    ) -> Engine:
        """Return an engine for a model of a running server.

        Parameters
        ----------
        path
            The model's name there; it is not a file.
        mode
            What it serves.
        name
            What results call it; None is its name there.
        config
            Refused when it holds anything: the server is configured elsewhere.
        base_url
            Such as ``http://127.0.0.1:11434/v1``; None reads the environment's ``OPENAI_BASE_URL``.
        api_key
            None reads ``OPENAI_API_KEY``; most local servers take any.
        socket
            A Unix socket that it listens on.
        check
            Ask the server for its models, and raise when this one is not among them.

        Raises
        ------
        ConfigError
            No address is given, or an option that the server cannot be told.
        ModelNotFound
            The server has no such model; the message lists those it has.
        BackendUnavailable
            The client is not installed, or the server does not answer.
        """
        self.install()
        if options or (config is not None and config.to_json()):
            given = ", ".join([*options, *(config.to_json() if config is not None else ())])
            raise ConfigError(
                f"openai takes base_url, api_key, socket and check; {given} is for whoever starts the server."
            )
        from nbinfer.engines.protocol import EngineInfo
        from nbinfer.engines.remote.engine import RemoteEngine

        # A path's own text: a model's name may hold slashes, and has no backslashes to lose.
        endpoint = endpoint_of(path.as_posix(), base_url=base_url, api_key=api_key, socket=socket)
        listed = _listed(endpoint) if check else {}
        info = EngineInfo(
            backend=self.name,
            model=name or endpoint.model,
            mode=mode,
            context_size=context_of(listed),
            trained_context_size=_number(listed.get("meta"), "n_ctx_train"),
            effective={"base_url": endpoint.base_url, "model": endpoint.model},
        )
        return RemoteEngine(endpoint, info, name=name)

    def run(
        self,
        socket: str,
        model: Path,
        model_ref: str,
        mode: Mode,
        config: ModelConfig,
        *,
        control: RunControl | None = None,
    ) -> None:
        """Run nothing: the server runs already.

        Raises
        ------
        NotSupported
            Always.
        """
        del socket, model, mode, config, control
        raise NotSupported(f"{model_ref} is served by another program; the sidecar does not run it.")

    def disk_usage(self) -> int:
        """Return 0: the models belong to the server."""
        return 0


def endpoint_of(
    model: str, *, base_url: str | None = None, api_key: str | None = None, socket: str | None = None
) -> Endpoint:
    """Return where a model is, with what the environment says where nothing is given.

    Raises
    ------
    ConfigError
        No address is given, or one of another kind.
    """
    from nbinfer.engines.remote.engine import Endpoint

    base_url = base_url or os.environ.get(BASE_URL) or ("http://localhost/v1" if socket else None)
    if base_url is None:
        raise ConfigError(
            "openai needs the server's address, such as "
            'load(…, backend="openai", base_url="http://127.0.0.1:8080/v1").'
        )
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url={base_url!r:.80} is refused: it begins with http:// or https://.")
    return Endpoint(
        base_url=base_url.rstrip("/"),
        model=model,
        api_key=api_key or os.environ.get(API_KEY) or "none",
        socket=socket,
    )


def context_of(listed: Mapping[str, Any]) -> int:
    """Return the context that a server's list of models names, as each kind of server calls it; 0: none."""
    return _number(listed, "max_model_len") or _number(listed.get("meta"), "n_ctx") or 0


def _number(found: Any, key: str) -> int | None:
    value = found.get(key) if isinstance(found, dict) else None
    return value if isinstance(value, int) and value > 0 else None


def _listed(endpoint: Any) -> dict[str, Any]:
    """Return what the server's list says about the model.

    Raises
    ------
    ModelNotFound
        It is not in the list.
    BackendUnavailable
        The server does not answer.
    """
    from nbinfer.engines.remote.questions import list_models

    try:
        models = list_models(endpoint, timeout=_LIST_SECONDS)
    except NbinferError as error:
        if not isinstance(error, BackendUnavailable):
            error.add_note("check=False loads the model without asking for the list.")
        raise
    for each in models:
        if endpoint.model == each.get("id") or endpoint.model in (each.get("aliases") or ()):
            return each
    names = [str(each.get("id")) for each in models]
    if not names:
        # Some servers list only what is loaded, and load on demand.
        return {}
    shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")  # noqa: PLR2004 - a line's worth
    raise ModelNotFound(f"{endpoint.base_url} has no model {endpoint.model!r:.80}; it has {shown}.")
