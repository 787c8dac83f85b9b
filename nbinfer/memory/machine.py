"""What memory there is: main memory within its limits, and the GPUs this process may use.

Nothing here fails: what cannot be read is a status in words. Nothing is imported or asked before it is
needed, and asking NVML takes no GPU memory, as a CUDA context would.
"""

from __future__ import annotations

import os
import platform
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nbinfer.contract.memory import RequiredMemory

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Ram:
    """Main memory, in bytes.

    ``available`` can be taken without swapping: pages of files in the cache count as available. ``limit``
    says what makes ``total`` smaller than the machine: ``cgroup``, ``MEM_LIMIT`` or nothing.
    """

    total: int
    available: int
    limit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, or one slice of one, in bytes.

    ``unified`` GPUs share their memory with the CPU: it is one pool with :class:`Ram`, not more.
    """

    index: int
    name: str
    uuid: str = ""
    total: int
    free: int
    unified: bool = False

    @property
    def used(self) -> int:
        """Bytes in use or reserved."""
        return self.total - self.free


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A snapshot. ``gpu_status`` says in words why there is no GPU, or what is doubtful about them."""

    ram: Ram
    gpus: tuple[Gpu, ...] = ()
    gpu_status: str = ""


def machine() -> Machine:
    """Look at this machine now; takes about a millisecond after the first call."""
    ram = main_memory()
    found, status = gpus(ram)
    here, more = Machine(ram=ram, gpus=found, gpu_status=status), _given_back.get()
    return here if more is None else _with_free(here, more)


_given_back: ContextVar[RequiredMemory | None] = ContextVar("nbinfer_given_back", default=None)


@contextmanager
def counted_as_free(memory: RequiredMemory) -> Iterator[None]:
    """Within it, :func:`machine` counts these bytes as free: of a model that goes before another comes."""
    token = _given_back.set(memory)
    try:
        yield
    finally:
        _given_back.reset(token)


def _with_free(here: Machine, memory: RequiredMemory) -> Machine:
    """Return the machine with more free memory; GPUs that share main memory give back to the one pool."""
    vram = {gpu.index: more for gpu, more in zip(here.gpus, memory.vram, strict=False)}
    shared = sum(vram.get(gpu.index, 0) for gpu in here.gpus if gpu.unified)
    free = min(here.ram.total, here.ram.available + memory.ram + shared)
    devices = tuple(
        replace(gpu, free=min(gpu.total, free if gpu.unified else gpu.free + vram.get(gpu.index, 0)))
        for gpu in here.gpus
    )
    return replace(here, ram=replace(here.ram, available=free), gpus=devices)


# -- main memory ----------------------------------------------------------------------------------------


def main_memory(
    root: Path = Path("/"), environ: Mapping[str, str] | None = None, *, own_bytes: int | None = None
) -> Ram:
    """Main memory within the limits of all control groups above this process, and of JupyterHub's MEM_LIMIT.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are; for tests.
    environ
        The environment; None is the process's own.
    own_bytes
        Resident bytes of this process; None asks.
    """
    import psutil

    memory = psutil.virtual_memory()
    ram = Ram(total=memory.total, available=memory.available)
    for limit, room in _cgroup_limits(root):
        ram = _within(ram, limit, room, "cgroup")
    told = _mem_limit(os.environ if environ is None else environ)
    if told is not None and told < ram.total:
        own = psutil.Process().memory_info().rss if own_bytes is None else own_bytes
        ram = _within(ram, told, max(0, told - own), "MEM_LIMIT")
    return ram


def _within(ram: Ram, limit: int, room: int, source: str) -> Ram:
    smaller = limit < ram.total
    return Ram(
        total=min(ram.total, limit),
        available=min(ram.available, room),
        limit=source if smaller else ram.limit,
    )


def _mem_limit(environ: Mapping[str, str]) -> int | None:
    try:
        limit = int(float(environ.get("MEM_LIMIT", "")))
    except (ValueError, OverflowError):
        return None
    return limit if limit > 0 else None


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, room left) of each control group with a memory limit, from the process's own up to the root."""
    paths = _own_groups(root)
    for kind, mount, inner in _mounts(root):
        if kind in paths:
            for group in _groups(mount, inner, paths[kind]):
                limit = _limit_v2(group) if kind == "cgroup2" else _limit_v1(group)
                if limit is not None:
                    yield limit


def _own_groups(root: Path) -> dict[str, str]:
    """The path of this process in the hierarchies that may limit memory; it can be moved at any time."""
    paths: dict[str, str] = {}
    for line in _text_of(f"{root}/proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    return paths


@lru_cache(maxsize=4)
def _mounts(root: Path) -> tuple[tuple[str, str, str], ...]:
    """(kind, mount point, root of the mount) of the hierarchies that may limit memory; read once."""
    found = []
    for line in _text_of(f"{root}/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:  # noqa: PLR2004 - the columns of mountinfo
            continue
        kind = kinds[0]
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in kinds[2].split(",")):
            found.append((kind, str(root / fields[4].lstrip("/")), fields[3]))
    return tuple(found)


@lru_cache(maxsize=8)
def _groups(mount: str, inner: str, path: str) -> tuple[str, ...]:
    """The folders of a control group and of those above it."""
    parts = Path(path.removeprefix(inner if inner != "/" else "").lstrip("/")).parts
    return tuple(str(Path(mount, *parts[:depth])) for depth in range(len(parts), -1, -1))


def _limit_v2(group: str) -> tuple[int, int] | None:
    limits = [n for n in (_number(f"{group}/memory.max"), _number(f"{group}/memory.high")) if n is not None]
    used = _number(f"{group}/memory.current") if limits else None
    if used is None:
        return None
    stat = _stat(f"{group}/memory.stat")
    cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return min(limits), max(0, min(limits) - max(0, used - cached))


def _limit_v1(group: str) -> tuple[int, int] | None:
    limit = _number(f"{group}/memory.limit_in_bytes")
    if limit is None or limit >= _UNLIMITED:
        return None
    used = _number(f"{group}/memory.usage_in_bytes")
    if used is None:
        return None
    stat = _stat(f"{group}/memory.stat")
    cached = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return limit, max(0, limit - max(0, used - cached))


def _stat(path: str) -> dict[str, int]:
    pairs = (line.split() for line in _text_of(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}  # noqa: PLR2004 - key value


def _number(path: str) -> int | None:
    """The number in a file; None when it says "max", something else, or is not there."""
    text = _text_of(path).partition("\n")[0].strip()
    return int(text) if text.isdigit() else None


def _text_of(path: str) -> str:
    try:
        # Not through pathlib: a dozen of these small files are read for each estimate.
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


# -- GPUs -----------------------------------------------------------------------------------------------

_lock = threading.Lock()


def gpus(ram: Ram, environ: Mapping[str, str] | None = None) -> tuple[tuple[Gpu, ...], str]:
    """GPUs this process may use, in CUDA's order, and a status in words (empty: all is well).

    ``CUDA_VISIBLE_DEVICES`` is followed by index, UUID and MIG id.
    """
    environ = os.environ if environ is None else environ
    if platform.system() == "Darwin":
        return _apple(ram), ""
    with _lock:
        nvml, problem = _nvml()
        if nvml is None:
            return (), problem
        try:
            devices = _devices(nvml)
            chosen = _visible(devices, environ.get("CUDA_VISIBLE_DEVICES"))
            found = tuple(_gpu(nvml, i, device, ram) for i, device in enumerate(chosen))
        except nvml.NVMLError as error:
            return (), f"the NVIDIA driver does not answer: {error}"
    return found, _doubts(devices, found, environ)


@cache
def _nvml() -> tuple[Any, str]:
    """NVML, started once; or None and why not."""
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        missing = getattr(pynvml, "NVMLError_LibraryNotFound", ())
        return None, "no NVIDIA driver" if isinstance(error, missing) else f"no usable NVIDIA driver: {error}"
    return pynvml, ""


@dataclass(frozen=True, slots=True)
class _Device:
    handle: Any
    name: str
    uuid: str
    slices: tuple[_Device, ...] = ()


def _devices(nvml: Any) -> list[_Device]:
    """All GPUs with their MIG slices, in the order of the PCI bus."""
    devices = []
    for i in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(i)
        slices = tuple(_describe(nvml, h) for h in _slice_handles(nvml, handle))
        whole = _describe(nvml, handle)
        devices.append(_Device(whole.handle, whole.name, whole.uuid, slices))
    return devices


def _describe(nvml: Any, handle: Any) -> _Device:
    return _Device(handle, _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle)))


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _slice_handles(nvml: Any, handle: Any) -> Iterator[Any]:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
        if not current:
            return
        for i in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i)
            except nvml.NVMLError:  # a place without a slice
                continue
    except nvml.NVMLError:  # a GPU that knows no MIG
        return


def _visible(devices: list[_Device], asked: str | None) -> list[_Device]:
    """What CUDA would show. A GPU cut into slices is seen as its first slice."""
    usable = [d.slices[0] if d.slices else d for d in devices]
    if asked is None:
        return usable
    chosen: list[_Device] = []
    for item in asked.split(","):
        found = _named(devices, usable, item.strip())
        # CUDA ignores everything from the first entry on that names nothing, or something again.
        if found is None or found in chosen:
            break
        chosen.append(found)
    return chosen


def _named(devices: list[_Device], usable: list[_Device], item: str) -> _Device | None:
    if item.isdigit():
        return usable[int(item)] if int(item) < len(usable) else None
    if item.startswith("MIG-"):
        slices = [s for d in devices for s in d.slices]
        return next((s for s in slices if s.uuid.startswith(item)), None)
    if item.startswith("GPU-"):
        matching = [u for d, u in zip(devices, usable, strict=True) if d.uuid.startswith(item)]
        return matching[0] if len(matching) == 1 else None
    return None


def _gpu(nvml: Any, index: int, device: _Device, ram: Ram) -> Gpu:
    memory = _memory_info(nvml, device.handle)
    if memory is None:
        # The driver has no memory of its own to tell of: the GPU uses the machine's.
        return Gpu(
            index=index, name=device.name, uuid=device.uuid, total=ram.total, free=ram.available, unified=True
        )
    total, free = memory
    return Gpu(index=index, name=device.name, uuid=device.uuid, total=total, free=free)


def _memory_info(nvml: Any, handle: Any) -> tuple[int, int] | None:
    try:
        # Version 2 tells what the driver keeps for itself; version 1 counts it as used.
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, TypeError, AttributeError):
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:
            return None
    return (int(memory.total), int(memory.free)) if memory.total else None


def _doubts(devices: list[_Device], found: tuple[Gpu, ...], environ: Mapping[str, str]) -> str:
    if not devices:
        return "no NVIDIA GPU"
    if not found:
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    by_index = any(item.strip().isdigit() for item in environ.get("CUDA_VISIBLE_DEVICES", "").split(","))
    mixed = len({d.name for d in devices}) > 1
    if by_index and mixed and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return "the GPUs differ, and CUDA may number them otherwise: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    return ""


def _apple(ram: Ram) -> tuple[Gpu, ...]:
    """The GPU of Apple silicon: a part of main memory, by the limit that is set or the usual share."""
    if platform.machine() != "arm64":
        return ()
    wired = _sysctl("iogpu.wired_limit_mb") << 20
    usual = ram.total * 2 // 3 if ram.total <= 36 << 30 else ram.total * 3 // 4
    total = wired or usual
    return (Gpu(index=0, name="Apple GPU", total=total, free=min(total, ram.available), unified=True),)


def _sysctl(name: str) -> int:
    import ctypes

    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    libc = ctypes.CDLL(None)
    libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return int(value.value)
