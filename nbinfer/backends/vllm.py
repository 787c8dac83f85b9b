"""The vLLM backend: so far, only what can be said about it."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.backends.disk import disk_usage
from nbinfer.contract import status as words
from nbinfer.contract.errors import BackendUnavailable, NotSupported
from nbinfer.contract.status import BackendStatus, StatusWord

if TYPE_CHECKING:
    from nbinfer.backends.process import RunControl
    from nbinfer.contract.config import ModelConfig
    from nbinfer.contract.modes import Mode
    from nbinfer.engines.protocol import Engine

_INSTEAD = "This release cannot run vLLM yet: use a GGUF file of the model, which the llamacpp backend runs."


class VllmBackend:
    """vLLM. This release recognises it and cannot run it."""

    name = "vllm"
    formats = ("safetensors",)
    allowed_flags: frozenset[str] = frozenset()
    uses_external_model_management = False
    uses_tcp = False

    def status(self) -> BackendStatus:
        """Look at the platform and the package's metadata; never ``Running`` while it cannot be run."""
        if sys.platform != "linux":
            return BackendStatus(StatusWord.NOT_INSTALLED, words.ONLY_LINUX)
        if _package() is None:
            return BackendStatus(StatusWord.NOT_INSTALLED, words.PACKAGE_NOT_INSTALLED)
        try:
            version = metadata.version("vllm") or words.VERSION_UNKNOWN
        except metadata.PackageNotFoundError:
            version = words.VERSION_UNKNOWN
        return BackendStatus(StatusWord.ERROR, f"vllm {version} is installed; this release cannot run it yet")

    def advice(self) -> str:
        """Return what to do instead."""
        return _INSTEAD

    def install(self) -> None:
        """Say that it cannot be used.

        Raises
        ------
        BackendUnavailable
            Always.
        """
        raise BackendUnavailable(f"vllm: {self.status()}\n{_INSTEAD}")

    def open(
        self, path: Path, *, mode: Mode, name: str = "", config: ModelConfig | None = None, **options: Any
    ) -> Engine:
        """Load no model.

        Raises
        ------
        NotSupported
            Always.
        """
        del mode, config, options
        raise NotSupported(f"{name or path.name}: {_INSTEAD}")

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
        """Serve no model.

        Raises
        ------
        NotSupported
            Always.
        """
        del socket, model, mode, config, control
        raise NotSupported(f"{model_ref}: {_INSTEAD}")

    def disk_usage(self) -> int:
        """Bytes of the installed package; 0 when it is not installed."""
        package = _package()
        return 0 if package is None else disk_usage([package])


def _package() -> Path | None:
    try:
        spec = importlib.util.find_spec("vllm")
    except ValueError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
