"""Tables of what there is: backends, models on this disk, models loaded, the health of it all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ConfigError
from nbinfer.contract.settings import configured
from nbinfer.contract.units import human_bytes
from nbinfer.session.calls import loaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from nbinfer.models import FoundModel


def status() -> pd.DataFrame:
    """Every known backend: name, status word, detail and how to install it. Takes milliseconds."""
    from nbinfer import backends
    from nbinfer.tables import table

    rows = [
        {"backend": name, "status": str(found.word), "detail": found.detail or "", "install": advice or ""}
        for name, found, advice in backends.statuses()
    ]
    return table("status", rows, ["backend", "status", "detail", "install"])


def models() -> pd.DataFrame:
    """Models on this disk: the demo models, and what other programs keep here (read, never copied).

    Columns: name, ref (what :func:`load` takes), source, architecture, parameters, quantisation, size_bytes,
    disk_bytes (files shared with a row above count once), context (tokens it was trained for), modes,
    verdict (whether it fits here as :func:`load` would load it), problem.
    """
    from nbinfer.models import discover
    from nbinfer.tables import table

    columns = ["name", "ref", "source", "architecture", "parameters", "quantisation", "size_bytes"]
    columns += ["disk_bytes", "context", "modes", "verdict", "problem"]
    return table("models", [_model_row(found) for found in discover()], columns)


def _model_row(found: FoundModel) -> dict[str, Any]:
    header = found.header
    row: dict[str, Any] = {
        "name": found.name,
        "ref": found.ref,
        "source": found.source,
        "size_bytes": found.size,
        "disk_bytes": found.disk_bytes,
        "problem": found.trouble or "",
    }
    if header is not None:
        row |= {
            "architecture": header.architecture,
            "parameters": header.parameters,
            "quantisation": str(header.quantisation),
            "context": header.context_length,
            "modes": ", ".join(header.modes),
            "verdict": _verdict(header),
        }
    return row


def _verdict(header: Any) -> str:
    """Whether a model fits here with the usual settings, by formula; empty where it is not llama.cpp's."""
    from nbinfer.contract.errors import NbinferError
    from nbinfer.gguf import Header
    from nbinfer.gguf.pipeline import PipelineHeader
    from nbinfer.memory import estimate, estimate_images

    try:
        if isinstance(header, PipelineHeader):
            return estimate_images(header).verdict
        if not isinstance(header, Header):
            return ""
        return estimate(header, exact=False).verdict
    except NbinferError:
        return ""


def ps() -> pd.DataFrame:
    """Loaded models: where they run, the context in use, what they do, and their memory as estimated.

    A notebook shows the columns that fit a page; the frame has them all.
    """
    from nbinfer.tables import table

    rows = []
    for m in loaded():
        now, required = m.engine.load(), m.required
        rows.append(
            {
                "name": m.name,
                "mode": str(m.mode),
                "backend": m.backend,
                "where": m.where,
                "context": m.info.context_size,
                "context_used": now.context_used,
                "parallel": m.info.parallel,
                "running": now.running,
                "waiting": now.waiting,
                "tokens": now.tokens_generated,
                "load_seconds": round(m.load_seconds, 3),
                "memory_bytes": None if required is None else required.ram + required.total_vram,
            },
        )
    columns = [
        "name",
        "mode",
        "backend",
        "where",
        "context",
        "context_used",
        "parallel",
        "running",
        "waiting",
        "tokens",
        "load_seconds",
        "memory_bytes",
    ]
    return table("ps", rows, columns)


_PACKAGES = ("ipython", "ipykernel", "pandas", "pyarrow", "llama-cpp-python", "vllm")


def doctor() -> pd.DataFrame:
    """Versions and health in one table, for a look or a report: columns what, status, detail.

    Packages, memory and GPUs, backends with what to type for those that are not usable, the models of this
    process, and the sidecar with its models and what killed ones left.
    """
    from nbinfer.sidecar.commands import checkup
    from nbinfer.tables import table

    rows = [*_versions(), *_devices(), _configuration()]
    for backend in status().itertuples(index=False):
        detail = ": ".join(filter(None, (str(backend.detail), str(backend.install))))
        rows.append({"what": f"backend {backend.backend}", "status": str(backend.status), "detail": detail})
    for model in loaded():
        info = model.info
        detail = f"{model.mode}, {model.backend}, context {info.context_size:,}, {info.parallel} at once"
        rows.append({"what": f"model {model.name}", "status": "ok", "detail": detail})
    return table("doctor", [*rows, *checkup()], ["what", "status", "detail"])


def _versions() -> Iterator[dict[str, str]]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from nbinfer._version import __version__

    yield {"what": "nbinfer", "status": "ok", "detail": __version__}
    detail = f"{platform.python_version()} on {platform.platform()}"
    yield {"what": "python", "status": "ok", "detail": detail}
    for package in _PACKAGES:
        try:
            yield {"what": package, "status": "ok", "detail": version(package)}
        except PackageNotFoundError:
            yield {"what": package, "status": "missing", "detail": ""}


def _configuration() -> dict[str, str]:
    from nbinfer.contract.settings import SETTINGS, sources

    try:
        for setting in SETTINGS:
            configured(setting.name)
        detail = "; ".join(sources()) or "defaults"
    except ConfigError as error:
        return {"what": "settings", "status": "error", "detail": str(error)}
    return {"what": "settings", "status": "ok", "detail": detail}


def _devices() -> Iterator[dict[str, str]]:
    from nbinfer.memory import machine

    here = machine()
    limit = f", limited by {here.ram.limit}" if here.ram.limit else ""
    detail = f"{human_bytes(here.ram.available)} free of {human_bytes(here.ram.total)}{limit}"
    yield {"what": "memory", "status": "ok", "detail": detail}
    for gpu in here.gpus:
        detail = f"{gpu.name}, {human_bytes(gpu.free)} free of {human_bytes(gpu.total)}"
        yield {"what": f"gpu {gpu.index}", "status": "ok", "detail": detail}
    if not here.gpus or here.gpu_status:
        word = "check" if here.gpus else "missing"
        yield {"what": "gpu", "status": word, "detail": here.gpu_status}
