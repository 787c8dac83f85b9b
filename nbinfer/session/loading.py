"""Loading: what was decided is carried out, or shown."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ConfigError, DoesNotFit
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import human_bytes
from nbinfer.session.held import session
from nbinfer.session.model import Model
from nbinfer.session.plans import Asked, Decision, LoadPlan, decide, estimate, known_mode, read, why_not

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbinfer.engines.protocol import Engine
    from nbinfer.models import ResolvedModel
    from nbinfer.models.hub import RemoteModel
    from nbinfer.sidecar.client import Plan


def load(
    ref: str | Path,
    *,
    backend: str | None = None,
    where: str = "kernel",
    mode: Mode | str | None = None,
    name: str | None = None,
    context_size: int | None = None,
    keep_alive: Any = None,
    gpu_layers: int | None = None,
    kv_type: str | None = None,
    parallel: int | None = None,
    speculative: Any = None,
    force: bool = False,
    progress: Any = None,
    **backend_options: Any,
) -> Model:
    """Load a model and return it; the same call again returns the model that is already there.

    With other settings it takes the place of the one of its name. That one stays until the new one is there,
    or goes before where there is no room for both; a load that would not fit even then leaves it as it is.

    Parameters
    ----------
    ref
        ``demo``, ``demo-embed``, a path to a GGUF file, or any reference that ``nb.models()`` shows.
    backend
        Name of the backend; None chooses by the file's format.
    where
        ``kernel``: inside this process. ``sidecar``: in a process of its own, shared by all your notebooks,
        that outlives a restart of this kernel by the model's keep-alive; it is started where there is none.
    mode
        ``completion``, ``embedding``, ``reranking`` or ``image-generation``; None reads it from the file.
    context_size
        Tokens of prompt and answer together; -1 is the trained maximum; None is that, up to 4,096
        (2,048 for embeddings and ranking).
    keep_alive
        How long the model stays loaded while idle: ``"5m"``, seconds, or a timedelta. None (the default for
        a model in the kernel, where a variable of yours holds it) and -1: until it is unloaded. In the
        sidecar the time runs once no kernel holds the model, and None is 5 minutes.
    gpu_layers
        Layers on the GPU; None is all of them where there is one.
    kv_type
        Type of the KV cache (``f16``, ``q8_0``, ``q4_0``…).
    parallel
        Sequences decoded at once.
    speculative
        Guess tokens ahead: ``{"draft_model": ref, "num_tokens": 4, "min_acceptance_rate": 0.5}``, each
        optional; without a draft model, or with True, phrases of the prompt are guessed. The text stays what
        it is.
    force
        Load although the estimate says that it does not fit.
    progress
        Called with the fraction loaded, 0 to 1.
    backend_options
        Passed to the backend: ``threads``, ``flash_attention``, ``mmap``, ``batch_size``,
        ``experts_on_cpu`` (True, or of how many first blocks a mixture's experts stay in main memory), …; for
        images ``device``, ``dtype``, ``batch``.

    Raises
    ------
    ModelNotFound
        No such file, model or alias.
    GGUFParseError, ModelLoadError
        The file cannot be read or loaded.
    DoesNotFit
        It needs more memory than there is; the message names a setting that fits.
    BackendUnavailable
        The backend is not installed; the message is the install line.
    ConfigError
        A setting is not valid.
    """
    _check_place(where)
    named = {
        "context_size": context_size,
        "gpu_layers": gpu_layers,
        "kv_type": kv_type,
        "parallel": parallel,
        "speculative": speculative,
    }
    options = {key: value for key, value in named.items() if value is not None} | backend_options
    if backend is not None and _is_external(backend):
        if keep_alive is not None:
            options["keep_alive"] = keep_alive
        return _load_external(str(ref), backend, mode=mode, name=name, options=options)
    asked = read(
        ref,
        {"confirm": None if force else confirm_download},
        backend=backend,
        where=where,
        mode=mode,
        name=name,
        keep_alive=keep_alive,
        force=force,
        **options,
    )
    with session.loading(name or asked.files.name):
        decision = decide(asked)
        if decision.refusal is not None:
            raise decision.refusal
        model = decision.present or _carried_out(asked, decision, progress)
    # In the sidecar the time runs there, and only while nobody holds the model.
    if where == "kernel":
        model.keep(asked.stay)
    return model


def _carried_out(asked: Asked, decision: Decision, progress: Callable[[float], None] | None) -> Model:
    """Load what was decided, and put it in the place of the model that it replaces."""
    if decision.replaces is not None and decision.goes_first:
        decision.replaces.unload()
    began = time.perf_counter()
    engine: Engine
    # Not the decision itself, which holds the model that is replaced.
    estimated: Callable[[], Any] = partial(_same, decision.estimate)
    if asked.where == "sidecar":
        from nbinfer.contract.config import ModelConfig
        from nbinfer.sidecar.client import open_engine

        engine = open_engine(
            asked.files.path,
            name=decision.name,
            backend=asked.backend.name,
            mode=asked.mode,
            config=ModelConfig(keep_alive=asked.stay),
            options=asked.options,
            on_progress=progress,
        )
        estimated = partial(estimate, asked, exact=False)
    else:
        engine = asked.backend.open(
            asked.files.path, mode=asked.mode, name=decision.name, on_progress=progress, **asked.options
        )
    model = Model(
        engine=engine,
        name=decision.name,
        ref=asked.ref,
        backend=asked.backend.name,
        where=asked.where,
        mode=asked.mode,
        config=asked.options,
        path=asked.files.path,
        paths=asked.files.paths,
        estimated=estimated,
        load_seconds=time.perf_counter() - began,
    )
    session.add(model)
    return model


def _same(value: Any) -> Any:
    return value


def _check_place(where: str) -> None:
    if where not in ("kernel", "sidecar"):
        raise ConfigError(f"where={where!r}: use 'kernel' or 'sidecar'.")


def _is_external(backend: str) -> bool:
    from nbinfer import backends

    return backends.get(backend).uses_external_model_management


def dry_run(
    ref: str | Path,
    *,
    backend: str | None = None,
    where: str = "kernel",
    mode: Mode | str | None = None,
    name: str | None = None,
    keep_alive: Any = None,
    **options: Any,
) -> LoadPlan:
    """Say what :func:`load` would do with the same arguments: what fits, and which models would go.

    Loads, unloads and downloads nothing, and starts no sidecar: where none runs, none of its models would go.

    Raises
    ------
    ModelNotFound
        No such file, model or alias, or it is not on this disk yet.
    BackendUnavailable, ConfigError, GGUFParseError
        As :func:`load`.
    """
    _check_place(where)
    if backend is not None and _is_external(backend):
        raise ConfigError(f"backend={backend!r} loads nothing: the server does.")
    options.pop("progress", None)
    asked = read(
        ref,
        {"download": False},
        backend=backend,
        where=where,
        mode=mode,
        name=name,
        keep_alive=keep_alive,
        **options,
    )
    decision = decide(asked)
    said: dict[str, Any] = {"name": decision.name, "where": where, "mode": asked.mode}
    if decision.present is not None:
        return LoadPlan(**said, loaded=True)
    said["required"] = None if decision.estimate is None else decision.estimate.required
    if decision.refusal is not None:
        return LoadPlan(**said, loaded=False, fits=False, reason=str(decision.refusal))
    unloads = () if decision.replaces is None else (decision.replaces.name,)
    if where == "kernel":
        return LoadPlan(**said, loaded=False, unloads=unloads)
    try:
        found = _planned_there(asked, decision)
    except DoesNotFit as error:
        return LoadPlan(**said, loaded=False, fits=False, reason=str(error))
    said |= {"required": found.required, "loaded": found.loaded and not unloads}
    return LoadPlan(**said, unloads=tuple(dict.fromkeys((*unloads, *found.unloads))))


def _planned_there(asked: Asked, decision: Decision) -> Plan:
    """Ask the sidecar, which knows its own room, what it would do."""
    from nbinfer.contract.config import ModelConfig
    from nbinfer.sidecar.client import plan

    return plan(
        asked.files.path,
        name=decision.name,
        backend=asked.backend.name,
        mode=asked.mode,
        config=ModelConfig(keep_alive=asked.stay),
        options=asked.options,
    )


def _load_external(
    ref: str, backend: str, *, mode: Mode | str | None, name: str | None, options: Mapping[str, Any]
) -> Model:
    """Name a model of a server that already runs; nothing is loaded here."""
    from nbinfer import backends

    actual_mode = Mode.COMPLETION if mode is None else known_mode(mode)
    name = name or ref
    engine = backends.get(backend).open(Path(ref), mode=actual_mode, name=name, **options)
    model = Model(
        engine=engine,
        name=name,
        ref=ref,
        backend=backend,
        where="server",
        mode=actual_mode,
        config=dict(options),
    )
    session.add(model)
    return model


def pull(ref: str, *, force: bool = False) -> ResolvedModel:
    """Download a model if it is not on this disk, and return its files.

    Says what memory it will take before the first byte of weights: when it will not fit here, it asks, or
    where nobody can be asked, raises.

    Raises
    ------
    ModelNotFound, ModelLoadError
        It cannot be found, or cannot be downloaded.
    DoesNotFit
        It will not fit, and ``force`` is not set.
    """
    from nbinfer.models import resolve

    return resolve(ref, aliases=session.aliases, confirm=None if force else confirm_download)


def confirm_download(remote: RemoteModel) -> None:
    """Show the estimate of a model that is not here yet; stop the download of one that will not fit."""
    from nbinfer.gguf import Header
    from nbinfer.memory import estimate

    header = remote.header
    if not isinstance(header, Header):
        return
    made = estimate(header)
    size = human_bytes(remote.n_bytes)
    if made.verdict != "does not fit":
        print(f"{remote.name}: {size} to download; {made.reason}.")  # noqa: T201 - said before a long wait
        return
    refusal = why_not(remote.name, made).replace("loads it", "downloads it")
    try:
        answer = input(f"{refusal}\nDownload {size} all the same? [y/N] ")
    except (EOFError, RuntimeError, OSError):  # nobody is there to answer
        raise DoesNotFit(refusal) from None
    if not answer.strip().lower().startswith("y"):
        raise DoesNotFit(refusal)
