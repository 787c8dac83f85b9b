"""Loading: which file, in which place, with which settings, and whether it fits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ConfigError, DoesNotFit
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import human_bytes
from nbinfer.session.held import session
from nbinfer.session.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbinfer.contract.memory import RequiredMemory
    from nbinfer.engines.protocol import Engine
    from nbinfer.models import ResolvedModel
    from nbinfer.models.hub import RemoteModel


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
    from nbinfer import backends
    from nbinfer.models import resolve

    _check_place(where)
    from nbinfer.contract.keepalive import KeepAlive

    if backend is not None and backends.get(backend).uses_external_model_management:
        named = {
            "context_size": context_size,
            "gpu_layers": gpu_layers,
            "kv_type": kv_type,
            "parallel": parallel,
            "speculative": speculative,
            "keep_alive": keep_alive,
        }
        set_here = {key: value for key, value in named.items() if value is not None}
        return _load_external(
            str(ref), backend, mode=mode, name=name, options={**set_here, **backend_options}
        )
    stay = None if keep_alive is None else KeepAlive.parse(keep_alive)
    resolved = resolve(str(ref), aliases=session.aliases, confirm=None if force else confirm_download)
    actual_mode = _natural_mode(resolved) if mode is None else _mode(mode)
    asked = _engine_options(
        resolved,
        actual_mode,
        {"confirm": None if force else confirm_download},
        context_size=context_size,
        gpu_layers=gpu_layers,
        kv_type=kv_type,
        parallel=parallel,
        speculative=speculative,
        **backend_options,
    )
    with session.loading(name or resolved.name) as free_name:
        name = name or free_name(resolved.path)
        known = session.named(name)
        if known is not None and known.is_load_of(resolved.path, actual_mode, where, asked):
            # In the sidecar the time runs there, and only while nobody holds the model.
            if where == "kernel":
                known.keep(stay)
            return known
        adapter = backends.for_format(resolved.format, backend)
        estimated: Callable[[], Any]
        if where == "kernel":
            estimate = _fits(resolved, actual_mode, asked, force=force, replacing=known)
            estimated = partial(_same, estimate)
        else:
            # The sidecar knows its own room, and can make some.
            estimated = partial(_estimate, resolved, actual_mode, asked, exact=False)
        began = time.perf_counter()
        engine: Engine
        if where == "sidecar":
            from nbinfer.contract.config import ModelConfig
            from nbinfer.sidecar.client import open_engine

            engine = open_engine(
                resolved.path,
                name=name,
                backend=adapter.name,
                mode=actual_mode,
                config=ModelConfig(keep_alive=stay),
                options=asked,
                on_progress=progress,
            )
        else:
            engine = adapter.open(
                resolved.path,
                mode=actual_mode,
                name=name,
                on_progress=progress,
                **asked,
            )
        model = Model(
            engine=engine,
            name=name,
            ref=str(ref),
            backend=adapter.name,
            where=where,
            mode=actual_mode,
            config=asked,
            path=resolved.path,
            paths=resolved.paths,
            estimated=estimated,
            load_seconds=time.perf_counter() - began,
        )
        session.add(model)
    if where == "kernel":
        model.keep(stay)
    return model


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a load would do; made by :func:`dry_run`.

    ``loaded``: it is there already, and nothing would happen. ``unloads``: names of the models that would go
    to make room, in that order, or that it would replace. ``required`` is in bytes, None where the file's
    kind allows no estimate; ``fits`` says whether it would be loaded, and ``reason`` why not.
    """

    name: str
    where: str
    mode: Mode
    loaded: bool
    unloads: tuple[str, ...] = ()
    required: RequiredMemory | None = None
    fits: bool = True
    reason: str = ""

    def __str__(self) -> str:
        if self.loaded:
            return f"{self.name} is loaded in the {self.where}: nothing would happen."
        if not self.fits:
            return f"{self.name} would not be loaded: {self.reason}"
        size = "" if self.required is None else f" It needs {human_bytes(self.required.ram)} of RAM"
        vram = 0 if self.required is None else self.required.total_vram
        size += f" and {human_bytes(vram)} on GPUs." if vram else "." if size else ""
        going = f" Unloaded for it: {', '.join(self.unloads)}." if self.unloads else " Nothing is unloaded."
        return f"{self.name} would be loaded in the {self.where}.{size}{going}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 - IPython's way to call it
        del cycle
        printer.text(str(self))


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
    from nbinfer import backends
    from nbinfer.models import resolve

    _check_place(where)
    if backend is not None and backends.get(backend).uses_external_model_management:
        raise ConfigError(f"backend={backend!r} loads nothing: the server does.")
    resolved = resolve(str(ref), aliases=session.aliases, download=False)
    actual_mode = _natural_mode(resolved) if mode is None else _mode(mode)
    force = bool(options.pop("force", False))
    options.pop("progress", None)
    asked = _engine_options(resolved, actual_mode, {"download": False}, **options)
    adapter = backends.for_format(resolved.format, backend)
    chosen = name or resolved.name
    known = session.named(chosen)
    if name is None and known is not None and known.path != resolved.path:
        known = None  # it would get a name of its own
    said: dict[str, Any] = {"name": chosen, "where": where, "mode": actual_mode}
    if known is not None and known.is_load_of(resolved.path, actual_mode, where, asked):
        return LoadPlan(**said, loaded=True)
    replaced = () if known is None else (known.name,)
    if where == "sidecar":
        from nbinfer.contract.config import ModelConfig
        from nbinfer.contract.keepalive import KeepAlive
        from nbinfer.sidecar.client import plan

        stay = None if keep_alive is None else KeepAlive.parse(keep_alive)
        try:
            found = plan(
                resolved.path,
                name=chosen,
                backend=adapter.name,
                mode=actual_mode,
                config=ModelConfig(keep_alive=stay),
                options=asked,
            )
        except DoesNotFit as error:
            return LoadPlan(**said, loaded=False, fits=False, reason=str(error))
        going = (*replaced, *(each for each in found.unloads if each not in replaced))
        return LoadPlan(**said, loaded=found.loaded, unloads=going, required=found.required)
    made = _estimate(resolved, actual_mode, asked)
    if made is None:
        return LoadPlan(**said, loaded=False, unloads=replaced)
    fits = force or made.verdict != "does not fit"
    reason = "" if fits else _refusal(resolved.name, made)
    return LoadPlan(**said, loaded=False, unloads=replaced, required=made.required, fits=fits, reason=reason)


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


def _check_place(where: str) -> None:
    if where not in ("kernel", "sidecar"):
        raise ConfigError(f"where={where!r}: use 'kernel' or 'sidecar'.")


def _engine_options(
    resolved: Any, mode: Mode, fetching: Mapping[str, Any], /, **options: Any
) -> dict[str, Any]:
    """Return what is asked of the engine, without what is left open; ``fetching`` is for ``resolve``."""
    if options.get("speculative") is not None:
        options["speculative"] = _speculative(options["speculative"], fetching)
    asked = {key: value for key, value in options.items() if value is not None}
    if resolved.projector is not None and mode == Mode.COMPLETION:
        asked.setdefault("projector", resolved.projector)
    return asked


def _load_external(
    ref: str, backend: str, *, mode: Mode | str | None, name: str | None, options: Mapping[str, Any]
) -> Model:
    """Name a model of a server that already runs; nothing is loaded here."""
    from nbinfer import backends

    actual_mode = Mode.COMPLETION if mode is None else _mode(mode)
    name = name or ref
    known = session.find(name)
    if known is not None:
        known.unload()
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
    refusal = _refusal(remote.name, made).replace("loads it", "downloads it")
    try:
        answer = input(f"{refusal}\nDownload {size} all the same? [y/N] ")
    except (EOFError, RuntimeError, OSError):  # nobody is there to answer
        raise DoesNotFit(refusal) from None
    if not answer.strip().lower().startswith("y"):
        raise DoesNotFit(refusal)


def _mode(asked: Mode | str) -> Mode:
    try:
        return Mode(asked)
    except ValueError as e:
        raise ConfigError(f"mode={asked!r} is unknown: use one of {', '.join(Mode)}.") from e


def _speculative(asked: Any, fetching: Mapping[str, Any]) -> Any:
    """What the contract calls ``speculative``, with the draft model's file found."""
    from nbinfer.contract.config import SpeculativeConfig
    from nbinfer.engines.llamacpp import Speculative
    from nbinfer.models import resolve

    if asked is True:
        asked = {}
    if not isinstance(asked, SpeculativeConfig | Mapping):
        raise ConfigError(
            'speculative is True, to guess from the prompt, or a dict such as {"num_tokens": 4}.'
        )
    config = asked if isinstance(asked, SpeculativeConfig) else SpeculativeConfig(**asked)
    draft = None
    if config.draft_model is not None:
        draft = resolve(config.draft_model, aliases=session.aliases, **fetching).path
    return Speculative(
        draft_path=draft,
        num_tokens=config.num_tokens,
        min_acceptance_rate=config.min_acceptance_rate,
    )


def _natural_mode(resolved: Any) -> Mode:
    """What the file says it is made for."""
    if resolved.format == "diffusers":
        return Mode.IMAGE_GENERATION
    modes = resolved.header.modes
    return Mode(modes[0]) if modes else Mode.COMPLETION


def _fits(
    resolved: Any, mode: Mode, asked: Mapping[str, Any], *, force: bool, replacing: Model | None = None
) -> Any:
    """Estimate before the load; refuse what does not fit. None when the file's kind allows no estimate.

    A model that the new one replaces stays while both fit, so that a load that fails costs nothing.

    Raises
    ------
    DoesNotFit
        It needs more memory than there is, and ``force`` is not set.
    """
    made = _estimate(resolved, mode, asked)
    too_much = made is not None and made.verdict == "does not fit"
    # Some engines hold one model per process: then the two cannot be there side by side.
    if replacing is not None and (too_much or getattr(replacing.engine, "alone", False)):
        replacing.unload()
        made = _estimate(resolved, mode, asked)
    if made is None:
        return None
    if made.verdict == "does not fit" and not force:
        raise DoesNotFit(_refusal(resolved.name, made))
    return made


def _estimate(resolved: Any, mode: Mode, asked: Mapping[str, Any], *, exact: bool | None = None) -> Any:
    """Return the estimate of a load; None when the file's kind allows none."""
    from nbinfer.backends.estimates import estimate_load
    from nbinfer.memory import CannotEstimate

    draft = getattr(asked.get("speculative"), "draft_path", None)
    try:
        return estimate_load(resolved, mode, asked, draft=draft, exact=exact)
    except CannotEstimate:
        return None


def _same(value: Any) -> Any:
    return value


def _refusal(name: str, made: Any) -> str:
    advice = made.advice()[:2]
    lines = [f"{name} {made.reason}."]
    for each in advice:
        options = ", ".join(f"{key}={value!r}" for key, value in each.changes.items())
        lines.append(f"It fits with {options} ({each.text}).")
    if not advice:
        lines.append("No setting makes it fit here: take a smaller quantisation or unload other models.")
    lines.append("force=True loads it all the same.")
    return "\n".join(lines)
