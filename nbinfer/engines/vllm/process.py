"""What vLLM does to the process that loads it, undone; and the one place that a process has for its model.

Loading re-seeds ``random``, NumPy and torch, leaves a dozen variables behind for every program that the
kernel starts later (``LD_PRELOAD`` among them), replaces ``torch.set_num_threads`` by a function that does
nothing and takes everything that is alive out of the garbage collector's sight. Its state is global: of two
models in one process, unloading one breaks the other.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol

from nbinfer.contract.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

QUIET = {
    # In this process: no children, and so nothing that could outlive it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Variables for a load in this process, beside those that a server takes as well."""

# Read once, when first imported, and then for the whole process: the user's own downloads must go on to work,
# and their own computations keep their threads.
_NOT_HERE = frozenset({"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"})
_NOISY = ("torch._library.triton", "transformers", "torch.distributed")


@contextmanager
def undisturbed(variables: Mapping[str, str]) -> Iterator[None]:
    """Run a load, with variables set for it, and leave the process as it was.

    Cells may run beside it, and what they set is theirs: only what this thread does is undone. Variables that
    it set are taken back where they still hold its value, and seeding the generators of ``random``, NumPy and
    torch does nothing on it: every request has a seed of its own. ``torch.set_num_threads`` and the garbage
    collector are restored.
    """
    frozen = gc.get_freeze_count()
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    try:
        # Not thread-safe; nothing else that warns runs while a cell loads a model.
        with _variables_taken_back(), warnings.catch_warnings():
            os.environ.update({name: value for name, value in variables.items() if name not in _NOT_HERE})
            os.environ.update(QUIET)
            # Threads that wait for each other in a loop stand still when the machine has other work.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            warnings.simplefilter("ignore")
            import numpy as np
            import torch

            set_threads = torch.set_num_threads
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            _show_llvm_as_empty()
            seeds = ((random, "seed"), (np.random, "seed"), (torch, "manual_seed"))
            try:
                with ExitStack() as undo:
                    over = threading.Event()
                    undo.callback(over.set)
                    for place, name in (*seeds, (torch.cuda, "manual_seed_all")):
                        undo.callback(setattr, place, name, getattr(place, name))
                        setattr(place, name, _not_on_this_thread(getattr(place, name), over))
                    yield
            finally:
                torch.set_num_threads = set_threads
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not frozen:
            gc.unfreeze()


@contextmanager
def _variables_taken_back() -> Iterator[None]:
    """Undo what this thread does to the environment meanwhile, where nobody else has changed it since."""
    this = threading.get_ident()
    before: dict[str, str | None] = {}
    ours: dict[str, str | None] = {}
    put, unset = os.putenv, os.unsetenv

    def note(name: Any, value: Any) -> None:
        if threading.get_ident() == this:
            before.setdefault(os.fsdecode(name), os.environ.get(os.fsdecode(name)))
            ours[os.fsdecode(name)] = None if value is None else os.fsdecode(value)

    def noted_put(name: Any, value: Any) -> None:
        note(name, value)
        put(name, value)

    def noted_unset(name: Any) -> None:
        note(name, None)
        unset(name)

    # ``os.environ`` calls these by their names, and is not told otherwise which thread has set what.
    os.putenv, os.unsetenv = noted_put, noted_unset
    try:
        yield
    finally:
        os.putenv, os.unsetenv = put, unset
        for name, value in ours.items():
            was = before[name]
            if os.environ.get(name) != value or was == value:
                continue
            if was is None:
                del os.environ[name]
            else:
                os.environ[name] = was


def _not_on_this_thread(function: Callable[..., Any], over: threading.Event) -> Callable[..., Any]:
    """Return a function that does nothing when it is this thread that calls it, until it is over.

    What is imported meanwhile may keep it.
    """
    this = threading.get_ident()

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == this and not over.is_set():
            return None
        return function(*args, **kwargs)

    return call


def _show_llvm_as_empty() -> None:
    """Keep vLLM from stumbling over numba, where that was imported before.

    vLLM for CPUs looks through every module's values and their ``__dict__``; llvmlite's library, which
    answers to any name, has a function of that one.
    """
    library: Any = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    with suppress(AttributeError, TypeError):
        library._fntab["__dict__"] = {}  # noqa: SLF001 - there is no other way


class Holder(Protocol):
    """What holds the place."""

    @property
    def name(self) -> str:
        """The model's name."""
        ...

    @property
    def closing(self) -> bool:
        """Whether it will leave by itself."""
        ...


class Place:
    """Room for one model."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holder: Holder | None = None

    def take(self, holder: Holder) -> None:
        """Take the place; waits for one that is on its way out.

        Raises
        ------
        NotSupported
            Another model has it.
        """
        with self._free:
            while self._holder is not None and self._holder.closing:
                self._free.wait(0.2)
            taken = "" if self._holder is None else self._holder.name
            if not taken and not _started_elsewhere():
                self._holder = holder
                return
        whose = f"the vLLM model {taken!r}" if taken else "a vLLM engine of your own"
        fix = f"Unload it first, nb.unload({taken!r})," if taken else "Restart the kernel,"
        raise NotSupported(
            f"{holder.name}: this kernel holds {whose}, and vLLM can hold one model per process: "
            f"unloading one of two would break the other.\n{fix} or load this one with where='sidecar'."
        )

    def leave(self, holder: Holder) -> None:
        """Give the place back."""
        with self._free:
            if self._holder is holder:
                self._holder = None
                self._free.notify_all()

    def forget(self) -> None:
        """Nobody has the place: this is a forked child, where a lock may be held for ever."""
        self._free = threading.Condition()
        self._holder = None


def _started_elsewhere() -> bool:
    """Whether somebody else's vLLM engine is alive in this process."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    return state is not None and bool(state.model_parallel_is_initialized())


PLACE = Place()
