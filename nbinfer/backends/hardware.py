"""What kind of GPU there is, without asking its driver."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_NVIDIA_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")


def gpu_kind() -> str | None:
    """Return which kind of GPU this machine has, from traces that the driver leaves; None: none was seen."""
    if sys.platform == "darwin":
        return "Metal" if os.uname().machine == "arm64" else None
    if sys.platform == "win32":
        system = Path(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32")
        return "CUDA" if (system / "nvcuda.dll").exists() else None
    return "CUDA" if any(Path(trace).exists() for trace in _NVIDIA_TRACES) else None
