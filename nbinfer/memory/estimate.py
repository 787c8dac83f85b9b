"""What a model will take, on which device, whether it fits, and what to change when it does not.

Two sources give the numbers, and each number says which: formulas, at once, and llama.cpp itself, asked in a
child process that plans the load and allocates nothing.
"""

from __future__ import annotations

import difflib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from nbinfer.contract.errors import ConfigError, NbinferError, NotSupported
from nbinfer.contract.memory import RequiredMemory
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import human_bytes, parse_bytes
from nbinfer.memory import defaults
from nbinfer.memory.analytic import layout
from nbinfer.memory.exact import CannotEstimate, Measured, ask
from nbinfer.memory.layout import CPU
from nbinfer.memory.machine import Gpu, Machine, machine
from nbinfer.memory.settings import Settings
from nbinfer.memory.shape import Shape
from nbinfer.memory.shown import FORMULA, VERDICTS, Advice, Device, Shown, Verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pandas as pd

    from nbinfer.gguf import Header
    from nbinfer.memory.layout import Layout


LLAMA_CPP, ASSUMED = "llama.cpp", "assumed"

# A CUDA context, its libraries' workspaces and pools: from small to large GPUs as published.
_GPU_OVERHEAD = (50 << 20, 550 << 20)
_VOCABULARY_BYTES = 379  # of each token in main memory, measured on vocabularies of 150,000 and 260,000
_PROCESS_OVERHEAD = (8 << 20, 40 << 20)

COMPONENTS = ("weights", "cache", "state", "compute", "output", "projector", "draft")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEstimate(Device):
    """Bytes on one device.

    Attributes
    ----------
    name, kind
        ``RAM`` or the GPU's name; ``ram`` or ``gpu``.
    weights, cache, state, compute, output, projector, draft
        The parts. ``weights`` in main memory are those that must be there; those that stay in the mapped
        file are ``file_backed``.
    file_backed
        Pages of the file: the system may drop them, and reads them again, slowly, when they are needed.
    at_hand
        The pages of those that computing reads again and again. What was copied out of the file, rearranged
        for the processor, is in ``weights`` and is not read there any more.
    overhead
        Least and most of what is known only roughly: the GPU's context, the vocabulary, buffers of libraries.
    available, total
        What is free now, and what there is.
    sources
        Where each part's number comes from: ``llama.cpp``, ``formula`` or ``assumed``.
    """

    PARTS = COMPONENTS

    weights: int = 0
    cache: int = 0
    state: int = 0
    compute: int = 0
    output: int = 0
    projector: int = 0
    draft: int = 0
    file_backed: int = 0
    at_hand: int = 0
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether it fits here; ``tight`` when it depends on the overhead, or on re-reading the file."""
        if self.known + self.overhead[0] > self.available:
            return "does not fit"
        return "fits" if self.known + self.overhead[1] + self.at_hand <= self.available else "tight"

    @property
    def counted(self) -> int:
        """Of the parts, what llama.cpp says that it holds: not the rows that it hands out, but the file."""
        return self.known - self.output + self.file_backed

    @property
    def working(self) -> int:
        """Of the parts, the buffers to compute in."""
        return self.compute

    def rows(self) -> Iterator[tuple[str, int, str]]:
        """Yield each part with its bytes and where that number comes from; what stays in the file too."""
        for part in (*COMPONENTS, "file_backed"):
            yield part, getattr(self, part), self.sources.get(part, FORMULA)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values; sizes in bytes."""
        return {
            **Device.to_dict(self),
            "file_backed": self.file_backed,
            "at_hand": self.at_hand,
            "verdict": self.verdict,
            "sources": dict(self.sources),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Estimate(Shown[DeviceEstimate]):
    """The memory of a model with given settings. Shows itself as a bar, prints itself as a table."""

    model: str
    settings: Settings
    devices: tuple[DeviceEstimate, ...]
    exact: bool
    """Whether llama.cpp itself was asked; else formulas alone answered, ``note`` says why."""
    context_size: int
    trained_context_size: int
    machine: Machine
    note: str = ""
    header: Header = field(repr=False, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ram(self) -> DeviceEstimate:
        """Main memory."""
        return self.devices[0]

    @property
    def gpus(self) -> tuple[DeviceEstimate, ...]:
        """The GPUs planned for, in order."""
        return self.devices[1:]

    @property
    def required(self) -> RequiredMemory:
        """Bytes to set aside: RAM that must be there, and each GPU's."""
        return RequiredMemory(ram=self.ram.required, vram=tuple(gpu.required for gpu in self.gpus))

    @property
    def verdict(self) -> Verdict:
        """``fits``, ``tight`` or ``does not fit``: that of the worst device."""
        if any(gpu.unified for gpu in self.machine.gpus) and self.gpus:
            pool = sum(device.known for device in self.devices)
            worst: Verdict = "does not fit" if pool > self.ram.available else "fits"
            return max(worst, *(d.verdict for d in self.devices), key=VERDICTS.index)
        return max((device.verdict for device in self.devices), key=VERDICTS.index)

    @property
    def reason(self) -> str:
        """The verdict in words."""
        if self.verdict == "fits":
            return "fits"
        device = max(self.devices, key=lambda d: (VERDICTS.index(d.verdict), d.required - d.available))
        free = human_bytes(device.available)
        if self.verdict == "does not fit":
            return f"does not fit: {human_bytes(device.required)} needed on {device.name}, {free} free"
        if device.known + device.overhead[1] > device.available:
            return f"tight: {human_bytes(device.required)} of {free} free on {device.name}"
        return (
            f"tight: {human_bytes(device.at_hand)} of weights stay in the file, and only "
            f"{human_bytes(device.available - device.required)} of memory is left to keep them at hand"
        )

    @property
    def asked(self) -> str:
        """The settings in words."""
        source = "asked of llama.cpp" if self.exact else "by formula"
        at_once = f"{self.settings.parallel} at once"
        return ", ".join([f"context {self.context_size:,}", at_once, f"KV {self.settings.kv_type}", source])

    def advice(self) -> tuple[Advice, ...]:
        """Return the nearest settings that fit, best first; empty when it fits, or when nothing helps.

        Found by search over the formulas; each is confirmed by the exact probe where that works.
        """
        from nbinfer.memory.advise import advise

        return advise(self) if self.verdict == "does not fit" else ()

    def again(self, **changes: Any) -> Estimate:
        """Estimate the same model with some options changed.

        Raises
        ------
        ConfigError
            :func:`estimate` has no such option.
        """
        for name in changes:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                known = ", ".join(sorted(self.options))
                raise ConfigError(f"nb.estimate has no option {name!r}.{hint}\nOptions: {known}.")
        return _estimate(self.header, self.model, {**self.options, **changes}, self.machine)

    def sweep(self, **options: Sequence[Any]) -> pd.DataFrame:
        """Estimate every combination of some options, by formula; :func:`nbinfer.plot_sweep` draws them.

        ``sweep(context_size=[2048, 8192], kv_type=["f16", "q8_0"])`` gives a row per combination: the
        options, ram, vram (bytes), verdict.
        """
        import pandas as pd

        rows = []
        for values in product(*options.values()):
            changes = dict(zip(options, values, strict=True))
            made = self.again(**changes, exact=False)
            vram = sum(made.required.vram)
            rows.append({**changes, "ram": made.required.ram, "vram": vram, "verdict": made.verdict})
        return pd.DataFrame(rows, columns=[*options, "ram", "vram", "verdict"])

    def _own_values(self) -> dict[str, Any]:
        return {
            "note": self.note,
            "context_size": self.context_size,
            "trained_context_size": self.trained_context_size,
        }


def estimate(
    ref: str | os.PathLike[str] | Header,
    *,
    mode: Mode | str | None = None,
    context_size: int | None = None,
    parallel: int | None = None,
    kv_type: str | None = None,
    gpu_layers: int | None = None,
    flash_attention: bool | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    mmap: bool = True,
    tensor_split: Sequence[float] | None = None,
    experts_on_cpu: bool | int = False,
    gpus: Sequence[str | int] | None = None,
    ram: str | int | None = None,
    projector: str | os.PathLike[str] | None = None,
    draft: str | os.PathLike[str] | None = None,
    prefix_cache: str | int | None = None,
    prefix_cache_folder: str | os.PathLike[str] | None = None,
    exact: bool | None = None,
    size: str | Sequence[int] | None = None,
    batch: int = 1,
) -> Estimate:
    """Say what memory a model will take, from its header alone; loads nothing.

    Parameters
    ----------
    ref
        Whatever ``nb.load`` takes, a model that is not downloaded included; or a header.
    mode
        What it would be loaded for; None reads it from the header.
    context_size
        Tokens; -1 is the trained maximum, None what ``nb.load`` takes by itself (that, up to 4,096, and up to
        2,048 for embeddings and ranking).
    parallel
        Sequences at once; None is what ``nb.load`` takes.
    kv_type
        Type of the KV cache: ``f16`` (default), ``q8_0``, …
    gpu_layers
        Layers on the GPUs, the output counted as one; None and -1 are all.
    flash_attention
        None lets llama.cpp decide.
    batch_size, micro_batch
        Tokens of one call, and of one computed graph.
    mmap
        Whether weights in main memory stay in the mapped file.
    tensor_split
        Shares of the GPUs.
    experts_on_cpu
        True: experts of a mixture stay in main memory; a number: those of so many first blocks.
    gpus
        GPUs to plan for, by their memory (``["24GiB"]``), here or not; ``[]`` is none. None: those of this
        machine that the installed llama.cpp can use.
    ram
        Main memory to plan for; None is what is free here.
    projector, draft
        Files of an image encoder and of a draft model loaded with it.
    prefix_cache, prefix_cache_folder
        Bytes for saved states of chats, counted to the most of the overhead; in a folder they take no memory.
    exact
        True asks llama.cpp itself and fails when it cannot be asked; False is formulas alone, in a
        millisecond; None asks where it can.
    size, batch
        Of an image pipeline: pixels, such as ``"512x768"``, and images computed at once. The answer is then a
        :class:`nbinfer.memory.ImageEstimate`, which shows, prints and advises as this one does. So does the
        :class:`nbinfer.memory.VllmEstimate` of a model of safetensors.

    Raises
    ------
    ModelNotFound
        No such model.
    GGUFParseError
        Its header cannot be read.
    ConfigError, NotSupported
        A setting is out of range, or this model cannot be run with it.
    """
    from nbinfer.gguf import Header, read_header
    from nbinfer.gguf.pipeline import PipelineHeader

    name = ""
    if isinstance(ref, Header):
        header = ref
    else:
        from nbinfer.models import peek

        found = peek(ref)
        read = found.header
        if isinstance(read, PipelineHeader):
            from nbinfer.memory.images import estimate_images

            images = estimate_images(read, size=size, batch=batch, gpus=gpus, ram=ram, name=found.name)
            return cast("Estimate", images)
        if not isinstance(read, Header):
            from nbinfer.memory.vllm import estimate_load

            served = estimate_load(
                read, context_size=context_size, kv_type=kv_type, gpus=gpus, name=found.name
            )
            return cast("Estimate", served)
        header, name = read, found.name
        beside = getattr(found, "projector", None)
        if projector is None and beside is not None:
            projector = beside
    options = {
        "mode": mode,
        "context_size": context_size,
        "parallel": parallel,
        "kv_type": kv_type,
        "gpu_layers": gpu_layers,
        "flash_attention": flash_attention,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "mmap": mmap,
        "tensor_split": tensor_split,
        "experts_on_cpu": experts_on_cpu,
        "projector": None if projector is None else read_header(projector),
        "draft": None if draft is None else read_header(draft),
        "saved": parse_bytes(prefix_cache) if prefix_cache is not None and prefix_cache_folder is None else 0,
        "exact": exact,
    }
    return _estimate(header, name or header.name or header.architecture, options, plan_machine(gpus, ram))


def plan_machine(
    gpus: Sequence[str | int] | None, ram: str | int | None, *, usable: Callable[[], bool] | None = None
) -> Machine:
    """Return the machine to plan for: this one, or one with the memory that was asked for.

    ``usable`` says whether the engine can use this machine's GPUs; None: whether llama.cpp can.
    """
    here = machine()
    if ram is not None:
        size = parse_bytes(ram)
        here = replace(here, ram=replace(here.ram, total=size, available=size, limit="asked"))
    if gpus is not None:
        sizes = [parse_bytes(size) for size in ([gpus] if isinstance(gpus, str) else gpus)]
        planned = tuple(Gpu(index=i, name=f"GPU {i}", total=size, free=size) for i, size in enumerate(sizes))
        return replace(here, gpus=planned, gpu_status="")
    return here if (usable or _build_uses_gpus)() else replace(here, gpus=())


def _build_uses_gpus() -> bool:
    """Whether the installed llama.cpp has a backend for GPUs, by the names of its libraries."""
    from nbinfer.memory.probe.client import ProbeUnavailable, library_folder

    kinds = ("cuda", "hip", "vulkan", "metal", "sycl", "musa")
    try:
        return any(f"ggml-{kind}" in path.name for path in library_folder().iterdir() for kind in kinds)
    except (ProbeUnavailable, OSError):
        return True  # nothing is installed yet: plan for what is there


# -- one estimate ---------------------------------------------------------------------------------------


def _estimate(header: Header, name: str, options: Mapping[str, Any], here: Machine) -> Estimate:
    if header.kind not in ("model", "vocabulary"):
        raise NotSupported(f"{name} is a GGUF {header.kind}, not a model of its own.")
    with _of_a_known_kind(name, header):
        shape = Shape.of(header)
        settings = _settings(shape, header, options, here)
        settings.check(shape)
        made = layout(shape, settings, [float(gpu.free) for gpu in here.gpus])
    measured, note = ask(header, settings, here, exact=options.get("exact"))
    sources = dict.fromkeys(("weights", "cache", "compute"), LLAMA_CPP if measured else FORMULA)
    sources |= {"state": FORMULA, "output": FORMULA, "projector": ASSUMED, "draft": FORMULA}
    if (made.rough or not shape.exact) and not measured:
        note = f"{shape.architecture} has parts that the formulas do not cover: the real need may differ"
    devices = [_ram(made, shape, settings, here, measured, sources)]
    devices += [_gpu(made, i, gpu, measured, sources) for i, gpu in enumerate(here.gpus)]
    _add_companions(devices, options, here, settings)
    return Estimate(
        model=name,
        settings=settings,
        devices=tuple(devices),
        exact=measured is not None,
        context_size=made.numbers.context_size,
        trained_context_size=shape.trained_context,
        machine=here,
        note=note,
        header=header,
        options=dict(options),
    )


@contextmanager
def _of_a_known_kind(name: str, header: Header) -> Iterator[None]:
    """Say of a header that the formulas trip over that it is none they know."""
    try:
        yield
    except NbinferError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CannotEstimate(
            f"the memory of {name} cannot be estimated: its header is not that of a known architecture "
            f"({header.architecture})."
        ) from error


def _settings(shape: Shape, header: Header, options: Mapping[str, Any], here: Machine) -> Settings:
    asked_mode = options["mode"]
    if asked_mode is not None and asked_mode not in tuple(Mode):
        raise ConfigError(f"mode={asked_mode!r} is unknown: use one of {', '.join(Mode)}.")
    mode = Mode(asked_mode) if asked_mode else (header.modes or (Mode.COMPLETION,))[0]
    pooled = mode in (Mode.EMBEDDING, Mode.RERANKING)
    size = options["context_size"]
    trained = shape.trained_context or defaults.CONTEXT
    usual_size = defaults.POOLED_CONTEXT if pooled else defaults.CONTEXT
    size = trained if size == -1 else min(trained, usual_size) if size is None else size
    usual = 1 if shape.recurrent else defaults.POOLED_PARALLEL if pooled else defaults.PARALLEL
    parallel = options["parallel"] or usual
    batch = size if pooled else min(options["batch_size"] or defaults.BATCH, max(size, defaults.LEAST_BATCH))
    flash = defaults.flash_attention(
        asked=options["flash_attention"],
        on_gpu=bool(here.gpus) and options["gpu_layers"] != 0,
        kv_type=options["kv_type"],
        context_size=size,
        pooled=pooled,
    )
    usual_micro = defaults.PLAIN_MICRO_BATCH if flash is False else defaults.MICRO_BATCH
    return Settings(
        context_size=size,
        parallel=parallel,
        kv_type=options["kv_type"] or "f16",
        gpu_layers=-1 if options["gpu_layers"] is None else options["gpu_layers"],
        flash_attention=flash,
        batch_size=batch,
        micro_batch=size if pooled else min(options["micro_batch"] or usual_micro, batch),
        mmap=options["mmap"],
        tensor_split=None if options["tensor_split"] is None else tuple(options["tensor_split"]),
        experts_on_cpu=options["experts_on_cpu"],
        n_outputs_max=None if pooled else parallel,
        pooled=pooled,
    )


def _ram(
    made: Layout,
    shape: Shape,
    settings: Settings,
    here: Machine,
    measured: Measured | None,
    sources: Mapping[str, str],
) -> DeviceEstimate:
    host = made.on(CPU)
    weights, cache, compute, repacked = host.weights, host.cache, host.compute, host.repacked
    state = host.state
    if measured is not None:
        weights, context, compute = measured.held[CPU]
        state = min(state, context)
        cache, repacked = context - state, measured.repacked
    # Mapped weights stay in the file; what is rearranged is copied out of it.
    anonymous = repacked if settings.mmap else weights
    vocabulary = _VOCABULARY_BYTES * shape.vocabulary
    return DeviceEstimate(
        name="RAM",
        kind="ram",
        weights=anonymous,
        cache=cache,
        state=state,
        compute=compute,
        output=made.output,
        file_backed=made.mapped,
        at_hand=min(weights - repacked, made.mapped),
        overhead=(_PROCESS_OVERHEAD[0] + vocabulary, _PROCESS_OVERHEAD[1] + vocabulary),
        available=here.ram.available,
        total=here.ram.total,
        sources=sources,
    )


def _gpu(
    made: Layout, number: int, gpu: Gpu, measured: Measured | None, sources: Mapping[str, str]
) -> DeviceEstimate:
    held = made.on(number)
    weights, cache, state, compute = held.weights, held.cache, held.state, held.compute
    if measured is not None:
        weights, context, compute = measured.held[number]
        state = min(state, context)
        cache = context - state
    return DeviceEstimate(
        name=gpu.name if gpu.name.startswith("GPU") else f"GPU {gpu.index} ({gpu.name})",
        kind="gpu",
        weights=weights,
        cache=cache,
        state=state,
        compute=compute,
        overhead=_GPU_OVERHEAD,
        available=gpu.free,
        total=gpu.total,
        sources=sources,
    )


def _add_companions(
    devices: list[DeviceEstimate], options: Mapping[str, Any], here: Machine, settings: Settings
) -> None:
    """Add saved states; on the first GPU, if there is one, an image encoder's weights and a draft model."""
    least, most = devices[0].overhead
    devices[0] = replace(devices[0], overhead=(least, most + options.get("saved", 0)))
    place = 1 if here.gpus and settings.gpu_layers != 0 else 0
    projector, draft = options.get("projector"), options.get("draft")
    if projector is not None:
        devices[place] = replace(devices[place], projector=projector.weights_bytes)
    if draft is not None:
        with_draft = replace(settings, parallel=1, n_outputs_max=1, experts_on_cpu=False, tensor_split=None)
        with _of_a_known_kind(draft.name or "the draft model", draft):
            made = layout(Shape.of(draft), with_draft, [float(gpu.free) for gpu in here.gpus])
        for number, held in made.held.items():
            at = number + 1
            mapped = held.weights - held.repacked if number == CPU and settings.mmap else 0
            devices[at] = replace(
                devices[at],
                draft=devices[at].draft + held.total - mapped,
                file_backed=devices[at].file_backed + mapped,
                at_hand=devices[at].at_hand + mapped,
            )
