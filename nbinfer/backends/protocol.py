"""What every backend adapter is: the one place that knows how a library is found, installed and started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from nbinfer.backends.process import RunControl
    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.modes import Mode
    from nbinfer.contract.status import BackendStatus
    from nbinfer.engines.protocol import Engine


class Backend(Protocol):
    """An adapter.

    Its members need not be safe for concurrent calls; the engines and servers that it starts are.
    """

    @property
    def name(self) -> str:
        """Lower case, fit for a URL path, a socket path and a person's eyes; constant."""
        ...

    @property
    def formats(self) -> Collection[str]:
        """Formats of model files that it runs: ``gguf``, ``safetensors``, …."""
        ...

    @property
    def allowed_flags(self) -> Collection[str]:
        """Spellings of the runtime flags that a configuration may carry to it."""
        ...

    @property
    def uses_external_model_management(self) -> bool:
        """Whether another program owns the model files (a server that already runs)."""
        ...

    @property
    def uses_tcp(self) -> bool:
        """Whether its server can only listen on TCP; otherwise it takes a Unix domain socket."""
        ...

    def status(self) -> BackendStatus:
        """Whether it can be used here: found in milliseconds, no engine imported into this process."""
        ...

    def advice(self) -> str:
        """Return the exact command, or the step, that makes it usable or faster; empty: none is needed."""
        ...

    def install(self) -> None:
        """Make sure that it can be used; nothing to do when it can. Downloads nothing by itself.

        Raises
        ------
        BackendUnavailable
            It cannot be used; the message is the exact install line.
        """
        ...

    def open(
        self, path: Path, *, mode: Mode, name: str = "", config: ModelConfig | None = None, **options: Any
    ) -> Engine:
        """Load a model into this process.

        Parameters
        ----------
        path
            The model's file, or the first of a split one.
        mode
            What it is loaded for.
        name
            What its results call it.
        config
            What was asked; options given by name come before it.
        options
            The engine's own options.

        Raises
        ------
        BackendUnavailable
            The backend is not installed, or not usable here.
        ConfigError
            There is no such option, or its value is refused.
        ModelLoadError
            The engine could not load the file.
        """
        ...

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
        """Serve the OpenAI API for exactly one model at ``socket``; return when its processes have ended.

        It returns only when cancelled, by ``control.cancel()``; else it raises the error that ended the
        server. It does not restart by itself, leaves no child process, and answers requests for another model
        with HTTP 421. ``control`` also brings the engine's options and takes the end of the server's output.
        """
        ...

    def disk_usage(self) -> int:
        """Bytes of what is installed; hard links and shared files count once."""
        ...


@runtime_checkable
class Updatable(Protocol):
    """A backend that can say more about newer versions of itself."""

    def update(self) -> None:
        """Bring a newer version, after a successful install."""
        ...


@runtime_checkable
class ChecksOptions(Protocol):
    """A backend that can refuse a mode or an option's name without loading anything."""

    def check(self, mode: Mode, options: Mapping[str, Any]) -> None:
        """Do nothing where ``open`` would take these, as far as their names say.

        Raises
        ------
        ConfigError
            There is no such option.
        NotSupported
            It does not serve the mode.
        """
        ...


@runtime_checkable
class ServesBeside(Protocol):
    """A backend whose models, in the sidecar, run in a server of its own beside the runner."""

    def open_server(
        self,
        path: Path,
        *,
        mode: Mode,
        name: str,
        config: ModelConfig,
        on_stage: Callable[[str, float], None],
        on_lost: Callable[[NbinferError], None],
        **options: Any,
    ) -> Engine:
        """Start the server for a model, and return the engine in front of it; closing that ends the server.

        Parameters
        ----------
        on_stage
            Called with the stage of the start, in words, and how much of it is done, 0 to 1.
        on_lost
            Called once with the crash report when the server ends by itself.

        Raises
        ------
        BackendUnavailable, ConfigError, NotSupported, ModelLoadError
            As ``Backend.open`` does.
        """
        ...
