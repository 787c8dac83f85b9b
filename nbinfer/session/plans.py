"""What a load would do, decided before anything is done: which model, where and how, and what goes for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ConfigError, DoesNotFit, NotSupported
from nbinfer.contract.memory import RequiredMemory
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import human_bytes
from nbinfer.session.held import session

if TYPE_CHECKING:
    from pathlib import Path

    from nbinfer.backends import Backend
    from nbinfer.backends.estimates import LoadEstimate
    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.keepalive import KeepAlive
    from nbinfer.models import ResolvedModel
    from nbinfer.session.model import Model


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a load was asked for, read: the files are found, the options are in the engine's form.

    ``name`` is None where none was given; ``options`` holds nothing that was left open.
    """

    ref: str
    files: ResolvedModel
    backend: Backend
    where: str
    mode: Mode
    name: str | None
    options: Mapping[str, Any]
    stay: KeepAlive | None
    force: bool


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a load has to do.

    Attributes
    ----------
    name
        What the model is called.
    present
        The model, where it is there already: then nothing.
    replaces
        The loaded model that goes for it.
    goes_first
        Whether that has to be gone before the new one comes. Else it stays until then, so that a load that
        fails costs nothing.
    estimate
        What the new one takes; None for the sidecar, which knows its own room and can make some, and where
        the file's kind allows none.
    refusal
        Why it must not be done.
    """

    name: str
    present: Model | None = None
    replaces: Model | None = None
    goes_first: bool = False
    estimate: LoadEstimate | None = None
    refusal: NbinferError | None = None


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What a load would do; made by :func:`nbinfer.dry_run`.

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


def read(
    ref: str | Path,
    fetching: Mapping[str, Any],
    /,
    *,
    backend: str | None = None,
    where: str = "kernel",
    mode: Mode | str | None = None,
    name: str | None = None,
    keep_alive: Any = None,
    force: bool = False,
    **options: Any,
) -> Asked:
    """Find the files and read the options of a load; ``fetching`` is for :func:`nbinfer.models.resolve`.

    Raises
    ------
    NbinferError
        As :func:`nbinfer.load`.
    """
    from nbinfer import backends
    from nbinfer.contract.keepalive import KeepAlive
    from nbinfer.models import resolve

    stay = None if keep_alive is None else KeepAlive.parse(keep_alive)
    files = resolve(str(ref), aliases=session.aliases, **fetching)
    actual_mode = _natural_mode(files) if mode is None else known_mode(mode)
    return Asked(
        ref=str(ref),
        files=files,
        backend=backends.for_format(files.format, backend),
        where=where,
        mode=actual_mode,
        name=name,
        options=_engine_options(files, actual_mode, fetching, options),
        stay=stay,
        force=force,
    )


def decide(asked: Asked) -> Decision:
    """Say what a load has to do; loads and unloads nothing.

    Raises
    ------
    NbinferError
        A setting is refused.
    """
    from nbinfer.backends.protocol import ChecksOptions
    from nbinfer.memory.machine import counted_as_free

    if asked.where == "kernel" and isinstance(asked.backend, ChecksOptions):
        # Before anything is unloaded for it: a name that is misspelled costs nobody a model.
        asked.backend.check(asked.mode, asked.options)
    files, name = asked.files, asked.name or session.free_name(asked.files.name, asked.files.path)
    known = session.named(name)
    if known is not None and known.is_load_of(
        files.path, asked.mode, asked.backend.name, asked.where, asked.options
    ):
        return Decision(name=name, present=known)
    if asked.where == "sidecar":
        return Decision(name=name, replaces=known)
    alone = _alone(asked)
    if alone is not None and alone is not known:
        return Decision(name=name, refusal=_one_at_a_time(name, alone))
    beside = estimate(asked) if alone is None else None
    # What goes in the sidecar may be held by others, and then gives nothing back.
    if known is None or known.where != "kernel" or (alone is None and _fits(beside)):
        return Decision(name=name, replaces=known, estimate=beside, refusal=_refusal(asked, beside))
    with counted_as_free(_given_back(known)):
        made = estimate(asked)
        refusal = _refusal(asked, made, " once the loaded one is gone")
    return Decision(name=name, replaces=known, goes_first=True, estimate=made, refusal=refusal)


def _alone(asked: Asked) -> Model | None:
    """Return the model beside which the new one cannot be: some engines hold one per process."""
    return next(
        (
            model
            for model in session.models()
            if model.where == "kernel"
            and model.backend == asked.backend.name
            and getattr(model.engine, "alone", False)
        ),
        None,
    )


def _one_at_a_time(name: str, there: Model) -> NotSupported:
    return NotSupported(
        f"{name}: this kernel holds the {there.backend} model {there.name!r}, and {there.backend} can hold "
        f"one model per process.\nUnload it first, nb.unload({there.name!r}), or load this one with "
        "where='sidecar'."
    )


def _given_back(model: Model) -> RequiredMemory:
    """Return what is free once a model is gone, as far as that is certain.

    The buffers to compute in do not count in main memory, where nothing is taken before it is written to;
    and this process cannot give back more than it has. What it needs around a model stays, but is in the
    estimate of the next one again.
    """
    import psutil

    required = model.required
    if required is None:
        return RequiredMemory()
    buffers = sum(device.working for device in model.memory.devices if device.kind == "ram")
    mine = psutil.Process().memory_info()
    own = mine.rss - getattr(mine, "shared", 0)
    return replace(required, ram=max(0, min(required.ram - buffers, own)))


def _fits(made: LoadEstimate | None) -> bool:
    return made is None or made.verdict != "does not fit"


def _refusal(asked: Asked, made: LoadEstimate | None, when: str = "") -> DoesNotFit | None:
    if made is None or asked.force or _fits(made):
        return None
    return DoesNotFit(why_not(asked.files.name, made, when))


def why_not(name: str, made: LoadEstimate, when: str = "") -> str:
    """Return in words why a model does not fit, and what would."""
    advice = made.advice()[:2]
    lines = [f"{name} {made.reason}{when}."]
    for each in advice:
        options = ", ".join(f"{key}={value!r}" for key, value in each.changes.items())
        lines.append(f"It fits with {options} ({each.text}).")
    if not advice:
        lines.append("No setting makes it fit here: take a smaller quantisation or unload other models.")
    lines.append("force=True loads it all the same.")
    return "\n".join(lines)


def estimate(asked: Asked, *, exact: bool | None = None) -> LoadEstimate | None:
    """Return the estimate of a load; None when the files' kind allows none."""
    from nbinfer.backends.estimates import estimate_load
    from nbinfer.memory import CannotEstimate

    draft = getattr(asked.options.get("speculative"), "draft_path", None)
    try:
        return estimate_load(asked.files, asked.mode, asked.options, draft=draft, exact=exact)
    except CannotEstimate:
        return None


def known_mode(asked: Mode | str) -> Mode:
    """Return a mode by its name.

    Raises
    ------
    ConfigError
        There is none of that name.
    """
    try:
        return Mode(asked)
    except ValueError as e:
        raise ConfigError(f"mode={asked!r} is unknown: use one of {', '.join(Mode)}.") from e


def _natural_mode(files: ResolvedModel) -> Mode:
    """What the file says it is made for."""
    if files.format == "diffusers":
        return Mode.IMAGE_GENERATION
    modes = files.header.modes
    return Mode(modes[0]) if modes else Mode.COMPLETION


def _engine_options(
    files: ResolvedModel, mode: Mode, fetching: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is asked of the engine, without what is left open."""
    asked = {key: value for key, value in options.items() if value is not None}
    if "speculative" in asked:
        asked["speculative"] = _speculative(asked["speculative"], fetching)
    if files.projector is not None and mode == Mode.COMPLETION:
        asked.setdefault("projector", files.projector)
    return asked


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
