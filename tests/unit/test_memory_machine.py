from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from nbinfer.contract.memory import RequiredMemory
from nbinfer.memory.machine import Gpu, Ram, counted_as_free, gpus, machine, main_memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

room: Any = importlib.import_module("nbinfer.memory.machine")  # the name in the package is the function

GIB = 1 << 30
HOST = psutil.virtual_memory().total
RAM = Ram(total=64 * GIB, available=40 * GIB)

V2_MOUNT = "30 1 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1_MOUNT = "33 1 0:29 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2_group(path: str, limit: str, current: int, *, cached: int = 0, high: str = "max") -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}".rstrip("/")
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{current}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 0\nshmem 7\n",
    }


V2 = {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": V2_MOUNT}
NONE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("files", "environ", "total", "available", "limit"),
    [
        pytest.param(NONE, NONE, HOST, None, "", id="no groups at all"),
        pytest.param({**V2, **v2_group("a/b", "max", GIB)}, NONE, HOST, None, "", id="unlimited"),
        pytest.param(
            {**V2, **v2_group("a/b", f"{2 * GIB}", GIB)}, NONE, 2 * GIB, GIB, "cgroup", id="own limit"
        ),
        pytest.param(
            {**V2, **v2_group("a/b", "max", 5), **v2_group("a", f"{2 * GIB}", GIB // 2)},
            NONE,
            2 * GIB,
            3 * GIB // 2,
            "cgroup",
            id="limit of a parent",
        ),
        pytest.param(
            {**V2, **v2_group("a/b", f"{GIB}", GIB, cached=GIB // 2)},
            NONE,
            GIB,
            GIB // 2,
            "cgroup",
            id="cache is usable",
        ),
        pytest.param(
            {**V2, **v2_group("a/b", "max", GIB, high=f"{2 * GIB}")},
            NONE,
            2 * GIB,
            GIB,
            "cgroup",
            id="memory.high",
        ),
        pytest.param(
            {**V2, **v2_group("a/b", f"{GIB}", 3 * GIB)},
            NONE,
            GIB,
            0,
            "cgroup",
            id="over its limit, never negative",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:memory:/docker/x\n4:cpu:/\n",
                "proc/self/mountinfo": V1_MOUNT.format(root="/docker/x"),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 2}",
                "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 4}\n",
            },
            NONE,
            GIB,
            3 * GIB // 4,
            "cgroup",
            id="version 1 inside a container",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:memory:/job/x\n",
                "proc/self/mountinfo": V1_MOUNT.format(root="/"),
                "sys/fs/cgroup/memory/job/x/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/job/x/memory.usage_in_bytes": "5",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIB}",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "0",
            },
            NONE,
            GIB,
            GIB,
            "cgroup",
            id="version 1, limit of a parent",
        ),
        pytest.param(NONE, {"MEM_LIMIT": f"{GIB}"}, GIB, GIB - 1000, "MEM_LIMIT", id="JupyterHub"),
        pytest.param(
            NONE, {"MEM_LIMIT": "1073741824.0"}, GIB, GIB - 1000, "MEM_LIMIT", id="JupyterHub, a float"
        ),
        pytest.param(NONE, {"MEM_LIMIT": "lots"}, HOST, None, "", id="nonsense in MEM_LIMIT"),
        pytest.param(NONE, {"MEM_LIMIT": f"{HOST * 2}"}, HOST, None, "", id="more than there is"),
        pytest.param(
            {"proc/self/cgroup": "garbage\n:\n0::/x", "proc/self/mountinfo": "a b c\n\n- -"},
            NONE,
            HOST,
            None,
            "",
            id="garbage",
        ),
    ],
)
def test_main_memory_is_what_the_narrowest_limit_leaves(
    tmp_path: Path,
    files: dict[str, str],
    environ: dict[str, str],
    total: int,
    available: int | None,
    limit: str,
) -> None:
    ram = main_memory(write(tmp_path, files), environ, own_bytes=1000)
    assert (ram.total, ram.limit) == (total, limit)
    if available is not None:
        assert ram.available == min(available, ram.available)
        assert ram.available == available or psutil.virtual_memory().available < available
    assert 0 <= ram.available <= ram.total


def test_a_process_that_is_moved_to_another_group_is_within_that_ones_limit(tmp_path: Path) -> None:
    groups = {**v2_group("a/b", f"{2 * GIB}", 0), **v2_group("c", f"{GIB}", 0)}
    write(tmp_path, {**V2, **groups})
    assert main_memory(tmp_path, NONE).total == 2 * GIB
    write(tmp_path, {"proc/self/cgroup": "0::/c\n"})
    assert main_memory(tmp_path, NONE).total == GIB


# -- GPUs on a scripted NVML ----------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, N818 - NVML's own name
    pass


@dataclass
class FakeGpu:
    name: str = "Card"
    uuid: str = "GPU-0"
    total: int = 24 * GIB
    free: int = 20 * GIB
    no_memory: bool = False
    slices: list[FakeGpu] = field(default_factory=list)


@dataclass
class FakeNvml:
    cards: list[FakeGpu]
    old: bool = False
    NVMLError: type = NVMLError
    NVMLError_LibraryNotFound: type = NVMLError_LibraryNotFound
    nvmlMemory_v2: int = 2  # noqa: N815 - NVML's own name

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, i: int) -> FakeGpu:  # noqa: N802
        return self.cards[i]

    def nvmlDeviceGetName(self, h: FakeGpu) -> bytes:  # noqa: N802
        return h.name.encode()

    def nvmlDeviceGetUUID(self, h: FakeGpu) -> str:  # noqa: N802
        return h.uuid

    def nvmlDeviceGetMigMode(self, h: FakeGpu) -> tuple[int, int]:  # noqa: N802
        if self.old:
            raise NVMLError("Not Supported")
        return (int(bool(h.slices)), 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, h: FakeGpu) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, h: FakeGpu, i: int) -> FakeGpu:  # noqa: N802
        if i >= len(h.slices):
            raise NVMLError("Not Found")
        return h.slices[i]

    def nvmlDeviceGetMemoryInfo(self, h: FakeGpu, version: int | None = None) -> Any:  # noqa: N802
        if h.no_memory or (self.old and version is not None):
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=h.total, free=h.free)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    def install(*cards: FakeGpu, old: bool = False) -> FakeNvml:
        fake = FakeNvml(list(cards), old)
        monkeypatch.setattr(room, "_nvml", lambda: (fake, ""))
        monkeypatch.setattr("platform.system", lambda: "Linux")
        return fake

    return install


def seen(environ: dict[str, str]) -> list[str]:
    return [gpu.uuid for gpu in gpus(RAM, environ)[0]]


TWO = (FakeGpu(uuid="GPU-aa11"), FakeGpu(uuid="GPU-bb22"))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aa11", "GPU-bb22"]),
        ("0,1", ["GPU-aa11", "GPU-bb22"]),
        ("1,0", ["GPU-bb22", "GPU-aa11"]),
        ("1", ["GPU-bb22"]),
        (" 1 , 0 ", ["GPU-bb22", "GPU-aa11"]),
        ("GPU-bb", ["GPU-bb22"]),
        ("GPU-bb22,GPU-aa11", ["GPU-bb22", "GPU-aa11"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["GPU-aa11"]),
        ("0,5,1", ["GPU-aa11"]),
        ("0,0", ["GPU-aa11"]),
        ("GPU-", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_gpus_are_those_cuda_would_show(
    nvml: Callable[..., FakeNvml], visible: str | None, expected: list[str]
) -> None:
    nvml(*TWO)
    assert seen({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == expected


def test_slices_are_seen_by_their_ids_and_the_first_by_default(nvml: Callable[..., FakeNvml]) -> None:
    slices = [FakeGpu(uuid=f"MIG-{i}", total=10 * GIB, free=9 * GIB) for i in range(2)]
    nvml(FakeGpu(uuid="GPU-cut", slices=slices), FakeGpu(uuid="GPU-whole"))
    assert seen({}) == ["MIG-0", "GPU-whole"]
    assert seen({"CUDA_VISIBLE_DEVICES": "MIG-1"}) == ["MIG-1"]
    (gpu,) = gpus(RAM, {"CUDA_VISIBLE_DEVICES": "MIG-1"})[0]
    assert (gpu.index, gpu.total, gpu.used) == (0, 10 * GIB, GIB)


def test_memory_of_a_unified_gpu_is_the_machines_own(nvml: Callable[..., FakeNvml]) -> None:
    nvml(FakeGpu(no_memory=True))
    (gpu,) = gpus(RAM, {})[0]
    assert (gpu.unified, gpu.total, gpu.free) == (True, RAM.total, RAM.available)


def test_an_old_driver_without_version_two_is_read_too(nvml: Callable[..., FakeNvml]) -> None:
    nvml(FakeGpu(), old=True)
    (gpu,) = gpus(RAM, {})[0]
    assert (gpu.total, gpu.free, gpu.unified) == (24 * GIB, 20 * GIB, False)


def test_what_is_doubtful_is_said(nvml: Callable[..., FakeNvml]) -> None:
    nvml()
    assert gpus(RAM, {}) == ((), "no NVIDIA GPU")
    nvml(*TWO)
    assert gpus(RAM, {"CUDA_VISIBLE_DEVICES": ""}) == ((), "CUDA_VISIBLE_DEVICES hides all GPUs")
    nvml(FakeGpu(name="Big"), FakeGpu(name="Small", uuid="GPU-1"))
    assert "PCI_BUS_ID" in gpus(RAM, {"CUDA_VISIBLE_DEVICES": "1"})[1]
    assert gpus(RAM, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})[1] == ""


def test_a_driver_that_breaks_down_is_a_status(
    nvml: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = nvml(FakeGpu())

    def broken() -> int:
        raise NVMLError("GPU is lost")

    monkeypatch.setattr(fake, "nvmlDeviceGetCount", broken)
    found, status = gpus(RAM, {})
    assert found == ()
    assert "GPU is lost" in status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NVMLError_LibraryNotFound("x"), "no NVIDIA driver"),
        (NVMLError("Driver Not Loaded"), "no usable NVIDIA driver: Driver Not Loaded"),
    ],
)
def test_without_a_driver_there_is_a_status_and_no_exception(
    monkeypatch: pytest.MonkeyPatch, error: NVMLError, status: str
) -> None:
    def init() -> None:
        raise error

    fake = SimpleNamespace(
        nvmlInit=init, NVMLError=NVMLError, NVMLError_LibraryNotFound=NVMLError_LibraryNotFound
    )
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    room._nvml.cache_clear()
    try:
        assert room._nvml() == (None, status)
    finally:
        room._nvml.cache_clear()


def test_apple_silicon_is_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(room, "_sysctl", lambda _name: 0)
    (gpu,) = gpus(RAM, {})[0]
    assert (gpu.unified, gpu.total) == (True, 48 * GIB)
    monkeypatch.setattr(room, "_sysctl", lambda _name: 50_000)
    assert gpus(RAM, {})[0][0].total == 50_000 << 20


def test_this_machine_can_be_looked_at() -> None:
    here = machine()
    assert 0 < here.ram.available <= here.ram.total <= HOST
    assert here.gpus or here.gpu_status


@pytest.mark.parametrize(
    ("given_back", "ram", "gpu"),
    [
        (RequiredMemory(3 * GIB), 43, 10),
        (RequiredMemory(3 * GIB, (2 * GIB,)), 43, 12),
        (RequiredMemory(90 * GIB, (90 * GIB,)), 64, 24),
        (RequiredMemory(GIB, (0, 4 * GIB)), 45, 10),
    ],
)
def test_what_a_model_will_give_back_counts_as_free_meanwhile(
    monkeypatch: pytest.MonkeyPatch, given_back: RequiredMemory, ram: int, gpu: int
) -> None:
    cards = (
        Gpu(index=0, name="a", total=24 * GIB, free=10 * GIB),
        Gpu(index=1, name="of one pool with the RAM", total=64 * GIB, free=40 * GIB, unified=True),
    )
    monkeypatch.setattr(room, "main_memory", lambda: RAM)
    monkeypatch.setattr(room, "gpus", lambda _: (cards, ""))
    before = machine()
    with counted_as_free(given_back):
        here = machine()
    assert here.ram.available == ram * GIB
    assert [each.free for each in here.gpus] == [gpu * GIB, ram * GIB]
    assert machine() == before
