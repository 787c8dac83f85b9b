"""States of sequences that the context had no room for any more, in main memory or in a folder.

A state is llama.cpp's own copy of a sequence's memory: putting it back costs a copy where computing it again
costs a whole prompt. It belongs to the weights, the settings and the build that made it, so a folder keeps
those of each apart. Losing one loses time and nothing else: whatever cannot be read is passed over.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nbinfer.engines.llamacpp.sequence import common_prefix

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_SUFFIX, _HALF = ".state", ".half"
_STALE_SECONDS = 3600


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    tokens: NDArray[np.int32]
    adapter: str | None
    size: int
    data: NDArray[np.uint8] | None = None
    path: Path | None = None


class SavedStates:
    """A store of states with a limit on its bytes; those unused for longest go first.

    Parameters
    ----------
    budget
        Bytes of states at most; of a folder, of all states in it.
    folder
        Where the states lie, readable by this user only; None keeps them in main memory.
    identity
        What the states depend on: weights, settings, build. States of another identity are never read.
    """

    def __init__(self, budget: int, folder: Path | None = None, *, identity: str = "") -> None:
        self._budget = budget
        self._states: list[_State] = []
        self._folder: Path | None = None
        if folder is not None:
            name = hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
            self._folder = folder / name
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._states = _listed(self._folder)
        self._shrink()

    @property
    def persistent(self) -> bool:
        """Whether the states outlive the process."""
        return self._folder is not None

    @property
    def size(self) -> int:
        """Bytes of all states."""
        return sum(state.size for state in self._states)

    def has(self, tokens: NDArray[np.int32], adapter: str | None) -> bool:
        """Whether a state is held that begins with these tokens."""
        return any(
            common_prefix(state.tokens, tokens) == len(tokens)
            for state in self._states
            if state.adapter == adapter
        )

    def longest(
        self, tokens: NDArray[np.int32], adapter: str | None, *, more_than: int, whole: bool
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]] | None:
        """Return the state with the longest beginning of ``tokens``, and the tokens it stands for.

        Parameters
        ----------
        more_than
            As many tokens, or fewer, are not worth it: None is returned.
        whole
            Only a state all of whose tokens are among these will do.
        """
        best, most = None, more_than
        for state in self._states:
            n = min(common_prefix(state.tokens, tokens), len(tokens) - 1)
            if state.adapter == adapter and n > most and not (whole and n < len(state.tokens)):
                best, most = state, n
        if best is None:
            return None
        self._states.remove(best)
        data = best.data if best.path is None else _read(best.path)
        if data is None:
            return None
        self._states.append(best)
        if best.path is not None:
            with suppress(OSError):
                os.utime(best.path)
        return data, best.tokens

    def put(self, tokens: NDArray[np.int32], adapter: str | None, data: NDArray[np.uint8]) -> None:
        """Keep a state; those that it continues are dropped, and the oldest where it grows too large."""
        if not len(data) or len(data) > self._budget:
            return
        state = _State(tokens.copy(), adapter, len(data), data)
        if self._folder is not None:
            path = _write(self._folder, state)
            if path is None:
                return
            state = replace(state, data=None, path=path)
        for old in list(self._states):
            if old.adapter == adapter and common_prefix(old.tokens, tokens) == len(old.tokens):
                self._drop(old)
        self._states.append(state)
        self._shrink()

    def _shrink(self) -> None:
        if self._folder is not None:
            _tidy(self._folder.parent, self._budget)
            self._states = [state for state in self._states if state.path is not None and state.path.exists()]
            return
        while self._states and self.size > self._budget:
            self._drop(self._states[0])

    def _drop(self, state: _State) -> None:
        self._states.remove(state)
        if state.path is not None:
            with suppress(OSError):
                state.path.unlink()


def _tidy(folder: Path, budget: int) -> None:
    """Keep a folder below its limit, whichever settings its states are of; what was half written goes too."""
    now, found = time.time(), []
    for path in folder.glob("*/*"):
        with suppress(OSError):
            about = path.stat()
            if path.suffix == _SUFFIX:
                found.append((about.st_mtime, about.st_size, path))
            elif path.suffix == _HALF and now - about.st_mtime > _STALE_SECONDS:
                path.unlink()
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found, key=lambda each: each[0]):
        if total <= budget:
            return
        with suppress(OSError):
            path.unlink()
        total -= size


def _write(folder: Path, state: _State) -> Path | None:
    """Write a state so that it is there whole or not at all; None where the disk does not take it."""
    from safetensors.numpy import save_file

    assert state.data is not None  # noqa: S101 - it has just been copied out of the context
    name = hashlib.blake2b(
        state.tokens.tobytes() + (state.adapter or "").encode(), digest_size=16
    ).hexdigest()
    path, half = folder / f"{name}{_SUFFIX}", folder / f"{name}.{os.getpid()}{_HALF}"
    about = {"sum": str(zlib.crc32(state.data.data)), "adapter": state.adapter or ""}
    try:
        os.close(os.open(half, os.O_WRONLY | os.O_CREAT, 0o600))
        save_file({"tokens": state.tokens, "state": state.data}, half, about)
        half.replace(path)
    except Exception:  # noqa: BLE001 - a full disk is not this request's trouble, whatever the library calls it
        with suppress(OSError):
            half.unlink()
        return None
    return path


def _listed(folder: Path) -> list[_State]:
    """The states of a folder, those unused for longest first; files that cannot be read are removed."""
    from safetensors import SafetensorError, safe_open

    found: list[tuple[float, _State]] = []
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            with safe_open(path, framework="np") as file:
                tokens, about = file.get_tensor("tokens"), file.metadata() or {}
                size = int(file.get_slice("state").get_shape()[0])
            state = _State(tokens, about.get("adapter") or None, size, path=path)
            found.append((path.stat().st_mtime, state))
        except OSError:
            continue  # it may be well another time
        except (SafetensorError, IndexError):
            with suppress(OSError):
                path.unlink()
    return [state for _, state in sorted(found, key=lambda pair: pair[0])]


def _read(path: Path) -> NDArray[np.uint8] | None:
    """The bytes of a state, checked; None, and no file any more, where they are not what was written."""
    from safetensors import SafetensorError, safe_open

    with suppress(SafetensorError, OSError):
        with safe_open(path, framework="np") as file:
            data: NDArray[np.uint8] = file.get_tensor("state")
            about = file.metadata() or {}
        if about.get("sum") == str(zlib.crc32(data.data)):
            return data
    with suppress(OSError):
        path.unlink()
    return None
