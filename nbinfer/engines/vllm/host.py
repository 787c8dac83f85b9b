"""A vLLM model in this process: the one thread that loads it, steps it and takes it down.

``vllm.LLM`` with its engine in the same process, stepped by a thread of ours, and not ``AsyncLLM``: that one
always starts processes, which live on with the model's memory when a kernel is killed, and takes five seconds
to stop. Here there is no child at all, a request streams and can be aborted between two steps, and closing
gives the memory back.
"""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import EngineClosed, EngineError, ModelLoadError, NbinferError
from nbinfer.engines.alive import register
from nbinfer.engines.vllm.amx import ask_for_amx
from nbinfer.engines.vllm.failures import failure
from nbinfer.engines.vllm.process import PLACE, undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PYDANTIC = "Value error, "


class Host:
    """Runs one model in a thread of its own.

    Parameters
    ----------
    name
        The model's name.
    settings
        Arguments of ``vllm.LLM``.
    variables
        The environment for the load.
    threads
        CPU threads for the model.
    prepare
        Called in the thread with the ``vllm.LLM``, as a part of the load.
    serve
        Called in the thread; returns when the engine closes.
    stopped
        Called when nothing runs any more, with the error for whoever still waits; lets go of the model.
    closed
        Called when the engine is to end, from any thread: for a ``serve`` that waits for something else than
        ``wake``.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        variables: Mapping[str, str],
        *,
        threads: int,
        prepare: Callable[[Any], None],
        serve: Callable[[], None],
        stopped: Callable[[NbinferError], None],
        closed: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.closing = False
        self.forked = False
        self._settings, self._variables, self._threads = settings, variables, threads
        self._prepare, self._serve, self._stopped, self._closed = prepare, serve, stopped, closed
        self._problem: BaseException | None = None
        self._loaded = threading.Event()
        self.wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"nbinfer-{name}", daemon=True)

    def start(self) -> None:
        """Load the model, and wait until it is there.

        Raises
        ------
        NotSupported
            There is a vLLM model in this process.
        ModelLoadError
            vLLM could not load the model.
        """
        PLACE.take(self)
        try:
            # An interrupt may come here too: it takes the thread a moment to begin.
            self._thread.start()
            register(self)
            # In slices, so that an interrupt is seen at once.
            while not self._loaded.wait(0.1):
                pass
        except BaseException:
            # vLLM cannot be stopped while it loads: the thread goes on alone, and frees what it has made.
            self._ask_to_end()
            if self._thread.ident is None:  # it never began
                PLACE.leave(self)
            raise
        if self._problem is not None:
            self._thread.join()
            raise self._problem

    def check_open(self) -> None:
        """Refuse use after the end.

        Raises
        ------
        EngineClosed
            The model was unloaded, or this is a forked process.
        """
        if self.forked:
            raise EngineClosed(
                f"{self.name} was loaded before this process was forked and cannot run here: "
                "load it in this process, or use threads."
            )
        if self.closing:
            raise EngineClosed(f"{self.name} was unloaded; load it again with nb.load.")

    def close(self) -> None:
        """End the thread and give the memory back; idempotent."""
        if self.forked:
            return
        self._ask_to_end()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _ask_to_end(self) -> None:
        with self.wake:
            self.closing = True
            self.wake.notify_all()
        if self._closed is not None:
            self._closed()

    def abandon(self) -> None:
        """Refuse all use: this is a forked child, where the thread does not exist."""
        self.forked = True
        PLACE.forget()

    # -- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._load()
            self._loaded.set()
            if not self.closing:
                self._serve()
        except NbinferError as e:
            self._end(e)
        except BaseException as e:  # noqa: BLE001 - whatever happened, nobody may be left waiting
            self._end(
                EngineError(f"vLLM stopped: {words(e)}")
                if self._loaded.is_set()
                else load_failure(self.name, e)
            )
        finally:
            # After an error of the GPU each of these may raise: whoever waits must not wait for ever.
            try:
                self._stopped(EngineClosed(f"{self.name} was unloaded while the request ran."))
            finally:
                try:
                    _take_down()
                finally:
                    PLACE.leave(self)
                    self._loaded.set()

    def _end(self, error: NbinferError) -> None:
        self.closing = True
        if self._loaded.is_set():
            self._stopped(error)
        else:
            # Its frames hold on to half a model.
            self._problem = error.with_traceback(None)
            self._problem.__context__ = self._problem.__cause__ = None

    def _load(self) -> None:
        with undisturbed(self._variables):
            _use_threads(self._threads)
            ask_for_amx()
            from vllm import LLM

            # Held by the engine that it is prepared for, and by nobody here.
            self._prepare(LLM(**self._settings))


def _use_threads(count: int) -> None:
    """Have this thread compute with ``count`` threads, and every other as it did before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    # What was set last is the default of threads that have not computed yet.
    restore = threading.Thread(target=torch.set_num_threads, args=(before,))
    restore.start()
    restore.join()


def _take_down() -> None:
    """Free what vLLM keeps for the process, after the last reference to the model is gone."""
    import sys

    if "vllm.distributed" not in sys.modules:
        return
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def words(error: BaseException) -> str:
    """Return what an error of vLLM's says, in one line; pydantic's own say it in their second."""
    lines = list(filter(None, (line.strip() for line in str(error).splitlines())))
    lines.sort(key=lambda line: not line.startswith(_PYDANTIC))
    said = lines[0] if lines else type(error).__name__
    return said.removeprefix(_PYDANTIC).split(" [type=")[0][:300]


def load_failure(name: str, error: BaseException) -> ModelLoadError:
    """Return why vLLM could not load a model, with what to do about it where that is known."""
    found = failure(str(error))
    if found is None:
        return ModelLoadError(f"vLLM cannot load {name}: {words(error)}")
    return ModelLoadError(f"vLLM cannot load {name}: {found.cause}.\n{found.fix[:1].upper()}{found.fix[1:]}.")
