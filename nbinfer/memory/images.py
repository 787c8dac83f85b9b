"""What an image pipeline will take: the weights of its parts, and the tensors of a step or of a decoding.

Weights come from the headers of the safetensors files. A pipeline's stages follow each other (the prompt is
read, the steps are done, the picture is decoded), so that the largest of them counts.

The sizes of the stages follow diffusers' own layers: of a UNet, the tensors kept for its way up and the
widest place, a feed-forward of eight times the channels; of a transformer, the widest place of a block; of a
VAE, three copies of what enters its last block at full size. They agree within 4 % with what torch allocates
for Stable Diffusion 1.5 and XL, Flux and the VAE that these share, and are up to 12 % too much for Stable
Diffusion 3, as ``benchmarks/image_memory.py`` counts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ConfigError, NotSupported
from nbinfer.contract.memory import RequiredMemory
from nbinfer.contract.requests import parse_size
from nbinfer.contract.units import human_bytes
from nbinfer.gguf.pipeline import PipelineHeader
from nbinfer.memory.shown import VERDICTS, Advice, Device, Shown, Verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from nbinfer.gguf.pipeline import Component
    from nbinfer.memory.machine import Machine

PARTS = ("text_encoders", "denoiser", "vae", "other", "activations")

# torch, diffusers and transformers themselves, measured from a bare interpreter; with a GPU, CUDA's part too.
_LIBRARIES = (400 << 20, 640 << 20)
_GPU_CONTEXT = (300 << 20, 800 << 20)
# What convolutions copy for themselves, and what the allocator keeps in pieces: of the activations.
_SCRATCH = (0.0, 1.0)
_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SMALLEST_SIDE = 128

_SKIP_AND_FEED_FORWARD = 21
_RESIDUAL = 3
_BLOCK, _SINGLE_BLOCK = 12.5, 15.5
_DECODE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDevice(Device):
    """Bytes on one device.

    Attributes
    ----------
    text_encoders, denoiser, vae, other
        Weights, as loaded.
    activations
        The largest stage's tensors.
    overhead
        Least and most of what is known only roughly: libraries, scratch space, the allocator's gaps.
    available, total
        What is free now, and what there is.
    """

    PARTS = PARTS

    text_encoders: int = 0
    denoiser: int = 0
    vae: int = 0
    other: int = 0
    activations: int = 0

    @property
    def verdict(self) -> Verdict:
        """Whether it fits here; ``tight`` when it depends on the overhead."""
        if self.known + self.overhead[0] > self.available:
            return "does not fit"
        return "fits" if self.known + self.overhead[1] <= self.available else "tight"

    @property
    def counted(self) -> int:
        """Of the parts, the weights: they are there between two images too."""
        return self.known - self.activations

    @property
    def working(self) -> int:
        """Of the parts, what one image is computed in."""
        return self.activations

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values; sizes in bytes."""
        return {**Device.to_dict(self), "verdict": self.verdict}


@dataclass(frozen=True, kw_only=True, repr=False)
class ImageEstimate(Shown[ImageDevice]):
    """The memory of an image pipeline. Shows itself as a bar, prints itself as a table.

    Attributes
    ----------
    model
        Its name.
    size
        (width, height) in pixels.
    batch
        Images computed at once.
    guided
        Whether each step computes the picture twice, with the prompt and without it.
    stages
        Bytes of tensors of each stage: ``text``, ``step``, ``decode``.
    """

    model: str
    size: tuple[int, int]
    batch: int
    dtype: str
    guided: bool
    devices: tuple[ImageDevice, ...]
    stages: Mapping[str, int]
    machine: Machine
    note: str = ""
    exact: bool = False
    header: PipelineHeader = field(repr=False, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ram(self) -> ImageDevice:
        """Main memory."""
        return self.devices[0]

    @property
    def gpus(self) -> tuple[ImageDevice, ...]:
        """The GPU that holds it, if one does."""
        return self.devices[1:]

    @property
    def required(self) -> RequiredMemory:
        """Bytes to set aside: of RAM, and of each GPU."""
        return RequiredMemory(ram=self.ram.required, vram=tuple(gpu.required for gpu in self.gpus))

    @property
    def verdict(self) -> Verdict:
        """``fits``, ``tight`` or ``does not fit``: that of the worst device."""
        return max((device.verdict for device in self.devices), key=VERDICTS.index)

    @property
    def reason(self) -> str:
        """The verdict in words."""
        if self.verdict == "fits":
            return "fits"
        device = max(self.devices, key=lambda d: (VERDICTS.index(d.verdict), d.required - d.available))
        return (
            f"{self.verdict}: {human_bytes(device.required)} needed on {device.name}, "
            f"{human_bytes(device.available)} free"
        )

    @property
    def asked(self) -> str:
        """The settings in words."""
        width, height = self.size
        words = [f"{width}x{height}", f"{self.batch} at once", self.dtype, "by formula"]
        return ", ".join(words)

    def advice(self) -> tuple[Advice, ...]:
        """Return the changes that make it fit: one image at once, a smaller size. Empty when it fits."""
        if self.verdict != "does not fit":
            return ()
        found = []
        if self.batch > 1 and self.again(batch=1).verdict != "does not fit":
            found.append(Advice("one image at once", {"batch": 1}))
        width, height = self.size
        while min(width, height) // 2 >= _SMALLEST_SIDE:
            width, height = width // 16 * 8, height // 16 * 8
            if self.again(batch=1, size=(width, height)).verdict != "does not fit":
                changes: dict[str, Any] = {"size": f"{width}x{height}"} | (
                    {"batch": 1} if self.batch > 1 else {}
                )
                found.append(Advice(f"{width}x{height} pixels", changes))
                break
        return tuple(found)

    def again(self, **changes: Any) -> ImageEstimate:
        """Estimate the same pipeline with some options changed."""
        return estimate_images(self.header, **{**self.options, "here": self.machine, **changes})

    def _own_values(self) -> dict[str, Any]:
        return {
            "note": self.note,
            "size": list(self.size),
            "batch": self.batch,
            "dtype": self.dtype,
            "stages": dict(self.stages),
        }


def estimate_images(
    ref: str | os.PathLike[str] | PipelineHeader,
    *,
    size: str | Sequence[int] | None = None,
    batch: int = 1,
    dtype: str | None = None,
    device: str | None = None,
    guided: bool = True,
    gpus: Sequence[str | int] | None = None,
    ram: str | int | None = None,
    name: str = "",
    here: Machine | None = None,
) -> ImageEstimate:
    """Say what memory an image pipeline will take, from its headers alone; loads nothing.

    Parameters
    ----------
    ref
        Whatever ``nb.load`` takes, or a header.
    size
        ``"512x768"`` or (width, height); None: what the pipeline makes by default.
    batch
        Images computed at once.
    dtype
        As for loading; None: float32 on a CPU, two bytes a number on a GPU.
    device
        ``cpu`` plans for main memory, whatever GPUs there are.
    guided
        Whether guidance is in use, which computes each step twice.
    gpus, ram
        Memory to plan for, here or not, as for ``nb.estimate``.

    Raises
    ------
    ModelNotFound
        No such model.
    NotSupported
        It is no image pipeline.
    ConfigError, RequestError
        A setting is out of range.
    """
    from nbinfer.memory.estimate import plan_machine

    if isinstance(ref, PipelineHeader):
        header = ref
    else:
        from nbinfer.models import peek

        found = peek(ref)
        read = found.header
        if not isinstance(read, PipelineHeader):
            raise NotSupported(f"{ref} is no image pipeline; nb.estimate answers for it.")
        header, name = read, name or found.name
    if type(batch) is not int or batch < 1:
        raise ConfigError(f"batch={batch!r:.60}: it is a whole number, at least 1.")
    if dtype is not None and dtype not in _DTYPE_BYTES:
        raise ConfigError(f"dtype={dtype!r:.60} is not known: use {', '.join(_DTYPE_BYTES)}.")
    machine = here or plan_machine(gpus, ram, usable=_torch_uses_gpus)
    on_gpu = bool(machine.gpus) and device != "cpu"
    kind = dtype or ("bfloat16" if on_gpu else "float32")
    pixels = header.image_size if size is None else parse_size(size)
    stages = stage_bytes(header, pixels, batch=batch, dtype=kind, guided=guided)
    parts = _weights(header, _DTYPE_BYTES[kind])
    activations = max(stages.values())
    scratch = [round(activations * share) for share in _SCRATCH]
    held: dict[str, Any] = {**parts, "activations": activations}
    spare = {"available": machine.ram.available, "total": machine.ram.total}
    devices: tuple[ImageDevice, ...]
    if on_gpu:
        chosen = min(int((device or "").partition(":")[2] or 0), len(machine.gpus) - 1)
        overhead = (_GPU_CONTEXT[0] + scratch[0], _GPU_CONTEXT[1] + scratch[1])
        devices = (
            ImageDevice(name="RAM", kind="ram", overhead=_LIBRARIES, **spare),
            # Those before it are there, and hold nothing: bytes are told by place.
            *(
                ImageDevice(
                    name=gpu.name if gpu.name.startswith("GPU") else f"GPU {gpu.index} ({gpu.name})",
                    kind="gpu",
                    available=gpu.free,
                    total=gpu.total,
                    **({**held, "overhead": overhead} if i == chosen else {}),
                )
                for i, gpu in enumerate(machine.gpus[: chosen + 1])
            ),
        )
    else:
        overhead = (_LIBRARIES[0] + scratch[0], _LIBRARIES[1] + scratch[1])
        devices = (ImageDevice(name="RAM", kind="ram", overhead=overhead, **spare, **held),)
    options = {"size": size, "batch": batch, "dtype": dtype, "device": device, "guided": guided, "name": name}
    known = header.denoiser is not None and header.components.get("vae") is not None
    return ImageEstimate(
        model=name or header.source.rstrip("/").rsplit("/", 1)[-1],
        size=pixels,
        batch=batch,
        dtype=kind,
        guided=guided,
        devices=devices,
        stages=stages,
        machine=machine,
        note="" if known else f"{header.architecture} has parts that the formulas do not cover",
        header=header,
        options=options,
    )


def _torch_uses_gpus() -> bool:
    """Whether the installed torch has a build for GPUs, by its version; True where none is installed yet."""
    from importlib import metadata

    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return True


def _weights(header: PipelineHeader, item: int) -> dict[str, int]:
    """Bytes of the weights as loaded: floating-point tensors change their type, packed ones stay."""
    sizes = dict.fromkeys(PARTS[:-1], 0)
    for part in header.components.values():
        role = (
            "text_encoders"
            if part in header.text_encoders
            else "denoiser"
            if part is header.denoiser
            else "vae"
            if part.name == "vae"
            else "other"
        )
        sizes[role] += sum(
            tensor.n_elements * item if tensor.type in _FLOATS else tensor.n_bytes for tensor in part.tensors
        )
    return sizes


def stage_bytes(
    header: PipelineHeader,
    size: tuple[int, int],
    *,
    batch: int = 1,
    dtype: str = "float32",
    guided: bool = True,
) -> dict[str, int]:
    """Return the bytes of tensors that each stage holds at most, weights aside.

    Parameters
    ----------
    size
        (width, height) in pixels.

    Returns
    -------
    dict
        ``text``, ``step`` and ``decode``; 0 for a stage that the pipeline has not.
    """
    item = _DTYPE_BYTES[dtype]
    cells = (size[0] // header.vae_scale) * (size[1] // header.vae_scale)
    twice = 2 if guided else 1
    vae = header.components.get("vae")
    denoiser = header.denoiser
    step = 0.0
    if denoiser is not None:
        step = _unet(denoiser, cells) if denoiser.name == "unet" else _transformer(header, denoiser, cells)
    # A VAE that overflows in float16 says so, and is then computed in float32.
    up = vae is not None and dtype == "float16" and bool(vae.config.get("force_upcast", False))
    return {
        "text": round(_text(header) * item * batch),
        "step": round(step * item * batch * twice),
        "decode": round(_decode(vae, size) * (4 if up else item) * batch) if vae is not None else 0,
    }


def _numbers(config: Mapping[str, Any], key: str) -> list[int]:
    value = config.get(key)
    return [n for n in value if isinstance(n, int)] if isinstance(value, list) else []


def _unet(part: Component, cells: int) -> float:
    """Numbers that one image's step holds: what is kept for the way up, and the widest place."""
    channels = _numbers(part.config, "block_out_channels")
    if not channels:
        return 0.0
    layers = part.config.get("layers_per_block", 2)
    kinds = part.config.get("down_block_types") or []
    per_level = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    kept = float(channels[0] * cells)
    widest = 0.0
    for level, width in enumerate(channels):
        here = cells / 4**level
        kept += per_level[level] * width * here
        if level + 1 < len(channels):
            kept += width * here / 4
        below = channels[min(level + 1, len(channels) - 1)]
        attends = level < len(kinds) and "Attn" in str(kinds[level])
        widest = max(
            widest,
            (_SKIP_AND_FEED_FORWARD * width if attends else 0) * here,
            _RESIDUAL * (width + below) * here,
        )
    return kept + widest


def _transformer(header: PipelineHeader, part: Component, cells: int) -> float:
    """Numbers that one image's step holds in the widest place of a block."""
    config = part.config
    heads, head = config.get("num_attention_heads"), config.get("attention_head_dim")
    hidden = config.get("inner_dim") or (
        heads * head if isinstance(heads, int) and isinstance(head, int) else 0
    )
    patch = config.get("patch_size")
    # Flux packs two by two cells before its transformer, whose own patch is then 1.
    side = 2 if not isinstance(patch, int) or patch < 2 else patch  # noqa: PLR2004
    single = bool(config.get("num_single_layers"))
    tokens = cells / side**2 + _prompt_tokens(header)
    return float(tokens * hidden * (_SINGLE_BLOCK if single else _BLOCK))


def _prompt_tokens(header: PipelineHeader) -> int:
    return sum(_tokens(part) for part in header.text_encoders)


def _tokens(part: Component) -> int:
    longest = part.config.get("max_position_embeddings")
    return min(longest, 512) if isinstance(longest, int) else 512


def _text(header: PipelineHeader) -> float:
    """Numbers that the largest text encoder holds for a prompt of full length."""
    most = 0.0
    for part in header.text_encoders:
        hidden = part.config.get("hidden_size") or part.config.get("d_model") or 0
        inner = part.config.get("intermediate_size") or part.config.get("d_ff") or 4 * hidden
        most = max(most, float(_tokens(part) * (3 * inner + 4 * hidden)))
    return most


def _decode(vae: Component, size: tuple[int, int]) -> float:
    """Numbers that decoding one image holds: three copies of what enters a block, at its size."""
    channels = _numbers(vae.config, "block_out_channels") or _numbers(
        vae.config, "decoder_block_out_channels"
    )
    if not channels:
        return 0.0
    pixels = size[0] * size[1]
    entering = [*channels[1:], channels[-1]]
    sizes = [_DECODE * width * pixels / 4**level for level, width in enumerate(entering)]
    return float(max(sizes))
