"""Open a vLLM model in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import BackendUnavailable, ConfigError, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.engines.vllm.arguments import arguments, environment
from nbinfer.engines.vllm.build import installed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbinfer.contract.config import ModelConfig
    from nbinfer.engines.protocol import Engine


def open_engine(
    path: Path,
    *,
    mode: Mode,
    name: str = "",
    config: ModelConfig | None = None,
    exact: bool = False,
    digest: str = "",
    on_progress: Callable[[float], None] | None = None,
    **options: Any,
) -> Engine:
    """Load a model of safetensors with vLLM, in this process, and return an engine for one mode.

    A process can hold one. Loading imports vLLM, which takes 5 to 10 seconds the first time.

    Parameters
    ----------
    path
        The folder of the model.
    exact
        Give the same text to the last bit, whatever ran before or runs beside: one request at a time, nothing
        kept of earlier ones.
    on_progress
        Called with 1.0 when the model is there: vLLM says nothing before.
    options
        Those of :data:`nbinfer.engines.vllm.arguments.OPTIONS`.

    Raises
    ------
    BackendUnavailable
        vLLM is not installed.
    ConfigError
        There is no such option, or its value is refused.
    NotSupported
        vLLM cannot do this in the kernel, or there is a vLLM model already.
    ModelLoadError
        vLLM could not load the model.
    """
    build = installed()
    if build is None:
        raise BackendUnavailable("vLLM is not installed here.\nInstall it with: pip install 'nbinfer[vllm]'")
    if not isinstance(exact, bool):
        raise ConfigError(f"exact={exact!r:.60}: it is True or False.")
    given = arguments(path, mode=mode, device=build.device, config=config, options=options)
    for option in ("reasoning_parser", "tool_call_parser"):
        if getattr(given, option):
            raise NotSupported(
                f"{option} belongs to vLLM's own server: in the kernel, thoughts and tool calls are found "
                "without it. Leave it out, or use where='sidecar'."
            )
    processes = given.engine.get("tensor_parallel_size", 1)
    if processes != 1:
        raise NotSupported(
            f"{name or path.name} would run on {processes} GPUs, which takes a process for each: "
            "use where='sidecar', or tensor_parallel=1."
        )
    from nbinfer.engines.llamacpp.library import default_threads

    described: dict[str, Any] = {
        "name": name or path.name,
        "threads": given.threads or default_threads(),
        "digest": digest,
        "version": build.version,
    }
    variables = environment(build.device, given)
    engine: Engine
    if mode is Mode.COMPLETION:
        from nbinfer.engines.vllm.generate import CompletionEngine

        engine = CompletionEngine(given, variables, device=build.device, exact=exact, **described)
    else:
        from nbinfer.engines.vllm.pooled import PooledEngine

        engine = PooledEngine(given, variables, mode=mode, **described)
    if on_progress is not None:
        on_progress(1.0)
    return engine
