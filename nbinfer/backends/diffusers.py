"""The diffusers backend: image pipelines of Hugging Face's library, in the kernel or in the sidecar."""

from __future__ import annotations

import importlib.util
import inspect
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.backends.disk import disk_usage
from nbinfer.contract import status as words
from nbinfer.contract.errors import BackendUnavailable, ConfigError, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.contract.status import BackendStatus, StatusWord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.backends.process import RunControl
    from nbinfer.contract.config import ModelConfig
    from nbinfer.engines.protocol import Engine

INSTALL = "pip install 'nbinfer[images]'"
NEEDED = ("torch", "transformers", "accelerate", "PIL")
"""What diffusers imports and does not ask for by itself, as the names of packages that are imported."""


class DiffusersBackend:
    """Image pipelines through diffusers."""

    name = "diffusers"
    formats = ("diffusers",)
    allowed_flags: frozenset[str] = frozenset()
    uses_external_model_management = False
    uses_tcp = False

    def status(self) -> BackendStatus:
        """Look for the packages; import none of them."""
        if _package("diffusers") is None:
            return BackendStatus(StatusWord.NOT_INSTALLED, words.PACKAGE_NOT_INSTALLED)
        missing = [name for name in NEEDED if _package(name) is None]
        if missing:
            return BackendStatus(StatusWord.NOT_INSTALLED, f"{words.PACKAGE_NOT_INSTALLED}: {missing[0]}")
        try:
            version = f"diffusers {metadata.version('diffusers')}"
        except metadata.PackageNotFoundError:
            version = f"diffusers, {words.VERSION_UNKNOWN}"
        return BackendStatus(StatusWord.RUNNING, version)

    def advice(self) -> str:
        """Return the command that installs it; empty when it is there."""
        return "" if self.status().usable else INSTALL

    def install(self) -> None:
        """Do nothing when it is there; else say how to install it.

        Raises
        ------
        BackendUnavailable
            With the exact command.
        """
        found = self.status()
        if not found.usable:
            raise BackendUnavailable(f"{self.name}: {found}\n{INSTALL}")

    def open(
        self, path: Path, *, mode: Mode, name: str = "", config: ModelConfig | None = None, **options: Any
    ) -> Engine:
        """Load an image pipeline into this process; the options are those of the engine.

        Raises
        ------
        BackendUnavailable
            diffusers is not installed; the message is the install line.
        NotSupported
            The mode is another than image generation, or the pipeline makes no images from text.
        ConfigError
            There is no such option.
        ModelLoadError, SafetensorsParseError
            The files cannot be loaded.
        """
        given = {**_asked(config), **options}
        self.check(mode, given)
        self.install()
        from nbinfer.engines.diffusers import open_engine

        return open_engine(path, name=name, **given)

    def check(self, mode: Mode, options: Mapping[str, Any]) -> None:
        """Refuse a mode that it does not serve, and an option that it does not have.

        Raises
        ------
        ConfigError, NotSupported
            As :meth:`open` does.
        """
        from nbinfer.engines.diffusers import open_engine

        if mode is not Mode.IMAGE_GENERATION:
            raise NotSupported(
                f"an image pipeline makes images: load it with mode={str(Mode.IMAGE_GENERATION)!r}."
            )
        known = [
            key
            for key, kind in inspect.signature(open_engine).parameters.items()
            if kind.kind is kind.KEYWORD_ONLY and key not in ("name", "digest", "on_progress")
        ]
        for option in options:
            if option not in (*known, "digest", "on_progress"):
                raise ConfigError(f"an image pipeline takes no {option}; it takes {', '.join(known)}.")

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
        """Serve one pipeline at a Unix socket, in a process of its own; return when that has ended.

        Raises
        ------
        BackendUnavailable
            diffusers is not installed.
        ConfigError
            A runtime flag is given: there are none.
        ModelLoadError, NotSupported, SafetensorsParseError
            The pipeline cannot be loaded.
        RunnerLost
            The process crashed; the message is the crash report.
        """
        from nbinfer.backends.process import serve_engine
        from nbinfer.contract.flags import check_flags

        self.install()
        check_flags(list(config.runtime_flags or ()), self.allowed_flags, backend=self.name)
        serve_engine(self.name, socket, model, model_ref, mode, config.without("runtime-flags"), control)

    def disk_usage(self) -> int:
        """Bytes of the installed package; 0 when it is not installed."""
        package = _package("diffusers")
        return 0 if package is None else disk_usage([package])


def _asked(config: ModelConfig | None) -> dict[str, Any]:
    """Return what a configuration holds that an image pipeline has no use for, keep-alive aside."""
    given = {} if config is None else config.to_json()
    return {key: value for key, value in given.items() if key != "keep_alive"}


def _package(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # something in sys.modules that was not imported
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
