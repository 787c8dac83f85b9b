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
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from nbinfer.contract.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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

    Restored are the environment, the states of ``random``, NumPy and torch, ``torch.set_num_threads``, and
    the garbage collector.
    """
    before = dict(os.environ)
    seeds = random.getstate()
    frozen = gc.get_freeze_count()
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    os.environ.update({name: value for name, value in variables.items() if name not in _NOT_HERE} | QUIET)
    # Threads that wait for each other in a loop stand still when the machine has other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        # Not thread-safe; nothing else that warns runs while a cell loads a model.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import numpy as np
            import torch

            drawn, tensors, set_threads = np.random.get_state(), torch.get_rng_state(), torch.set_num_threads  # noqa: NPY002 - the global state is what vLLM sets
            on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            _show_llvm_as_empty()
            try:
                yield
            finally:
                np.random.set_state(drawn)  # noqa: NPY002 - as above
                torch.set_rng_state(tensors)
                if on_gpus:
                    torch.cuda.set_rng_state_all(on_gpus)
                torch.set_num_threads = set_threads
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        random.setstate(seeds)
        if not frozen:
            gc.unfreeze()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


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
