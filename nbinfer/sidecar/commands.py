"""What `nbinfer serve`, `stop` and `ps` do."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import BackendUnavailable, ConfigError
from nbinfer.contract.keepalive import KeepAlive
from nbinfer.contract.memory import RequiredMemory
from nbinfer.sidecar import discovery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Read an amount of memory: ``8G``, ``512MiB``, ``1.5 GB`` (units of 1024).

    Raises
    ------
    ConfigError
        It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{text!r:.40} is not an amount of memory: write 8G, 512M or a number of bytes.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def serve(
    models: Sequence[str] = (),
    *,
    port: int | None = None,
    token: str | None = None,
    ram: str | None = None,
    vram: Sequence[str] = (),
    keep_alive: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run the sidecar here until it is stopped.

    Parameters
    ----------
    models
        References to load at once; others are loaded when a kernel asks for them.
    port
        Listen on 127.0.0.1 too; 0 takes a free port.
    token
        What clients must send there; None takes ``NBINFER_TOKEN`` or makes one.
    ram, vram
        What all models together may take: of RAM, and of each GPU's memory.
    keep_alive
        Of models that say nothing.
    say
        Shows a line.

    Raises
    ------
    BackendUnavailable
        A sidecar runs already, or its packages are missing.
    ConfigError
        An option is refused.
    """
    discovery.check_packages()
    budget = _budget(ram, vram)
    stay = KeepAlive.DEFAULT if keep_alive is None else KeepAlive.parse(keep_alive)
    running = discovery.find()
    if running is not None:
        raise BackendUnavailable(
            f"a sidecar runs already (process {running.pid}, {running.socket}).\nStop it first: nbinfer stop."
        )
    from nbinfer.sidecar.service import Options, run

    options = Options(
        budget=budget,
        port=port,
        token=token or os.environ.get("NBINFER_TOKEN"),
        persistent=True,
        keep_alive=stay,
        models=tuple(models),
    )

    def ready(found: discovery.Service) -> None:
        say(f"socket   {found.socket}")
        if found.address is not None:
            say(f"address  {found.address}/v1")
            say(f"token    {found.token}")
        sys.stdout.flush()

    with discovery.locked():
        pass  # whoever is starting one has finished
    asyncio.run(run(options, ready))
    sys.stdout.flush()
    os._exit(0)


def _budget(ram: str | None, vram: Sequence[str]) -> RequiredMemory | None:
    if ram is None and not vram:
        return None
    from nbinfer.sidecar.sizes import default_budget

    usual = default_budget()
    return RequiredMemory(
        usual.ram if ram is None else parse_bytes(ram),
        tuple(parse_bytes(each) for each in vram) or usual.vram,
    )


def rows() -> list[dict[str, Any]]:
    """Return a row for each model in the sidecar: what `ps` shows."""
    found = discovery.describe()
    out = []
    for each in [] if found is None else found["models"]:
        left = each["expires_seconds"]
        until = "for ever" if each["keep_alive"] == "-1" else "in use" if left is None else f"{left:.0f} s"
        state = each["state"]
        if state == "loading":
            until, state = "", f"{each['stage']} {each['fraction']:.0%}"
        out.append(
            {
                "name": each["name"],
                "mode": each["mode"],
                "backend": each["backend"],
                "state": state,
                "context": each["info"].get("context_size"),
                "running": each["busy"],
                "kernels": each["holds"],
                "ram": f"{each['rss'] / 2**20:,.0f} MiB",
                "until": until,
                "pid": each["pid"],
            }
        )
    return out


def checkup() -> list[dict[str, str]]:
    """Return what `doctor` says: the sidecar, its models and who holds them, and files that lie about."""
    running = discovery.find()
    out = []
    if running is None:
        out.append({"what": "sidecar", "status": "ok", "detail": "none runs; the first load starts one"})
    else:
        found = discovery.describe() or {"holds": 0, "models": []}
        detail = f"process {running.pid}, nbinfer {running.version}, held by {found['holds']} kernel(s)"
        out.append({"what": "sidecar", "status": "ok", "detail": detail})
    for row in rows():
        detail = f"{row['mode']}, {row['state']}, {row['ram']}, {row['kernels']} kernel(s), {row['until']}"
        out.append({"what": f"sidecar model {row['name']}", "status": "ok", "detail": detail})
    for path in discovery.stale_files():
        detail = f"{path}: of a sidecar that was killed; the next one removes it"
        out.append({"what": "stale file", "status": "left over", "detail": detail})
    return out
