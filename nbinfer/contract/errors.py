"""Every error that nbinfer raises on purpose.

Each one also inherits the built-in error a Python programmer would expect, says what was asked, what is
possible and the fix, in a few lines.
"""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from traceback import FrameSummary
from typing import TYPE_CHECKING, ClassVar

from nbinfer.contract.rendering import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from nbinfer.contract.results import Result


class NbinferError(Exception):
    """Base of all errors raised by nbinfer; catching it catches everything expected to go wrong.

    A notebook shows the message and the caller's own line, because the message says what to do and the frames
    inside nbinfer do not. Setting ``NbinferError.full_tracebacks = True`` shows everything.
    """

    full_tracebacks: ClassVar[bool] = False

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows instead of a traceback.

        Messages hold names of files and models, which may come from anywhere: no control character of theirs
        reaches a terminal.
        """
        if NbinferError.full_tracebacks:
            lines = traceback.format_exception(self)
        else:
            lines = [f"{type(self).__name__}: {self}", *getattr(self, "__notes__", ())]
            place = _callers_line(self.__traceback__)
            lines += [place] if place else []
        return [printable(line) for line in lines]


@contextmanager
def short_interrupt(words: str) -> Iterator[None]:
    """Have an interrupt of the block shown as ``words`` and the caller's own line, as errors of ours are.

    The interrupt itself goes on as it came; only what IPython shows of it is short.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        interrupt = error  # the name in an except clause ends with it

        def lines() -> list[str]:
            if NbinferError.full_tracebacks:
                return traceback.format_exception(interrupt)
            place = _callers_line(interrupt.__traceback__)
            return [f"KeyboardInterrupt: {words}", *([place] if place else [])]

        error._render_traceback_ = lines  # type: ignore[attr-defined]
        raise


def _callers_line(trace: TracebackType | None) -> str | None:
    """Return the line of code that called nbinfer; None when a magic did, whose line is the cell itself."""
    before: FrameSummary | None = None
    for frame, number in traceback.walk_tb(trace):
        room = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if room == "nbinfer":
            break
        name = "" if frame.f_globals.get("__name__") == "__main__" else f"{frame.f_code.co_filename}, "
        summary = FrameSummary(frame.f_code.co_filename, number, name)
        before = None if room in ("IPython", "ipykernel") else summary
    if before is None or not before.line:
        return None
    return f"  {before.name}line {before.lineno}: {before.line}"


class ConfigError(NbinferError, ValueError):
    """A setting was refused when it was set: unknown name, wrong type, or out of range."""


class RequestError(NbinferError, ValueError):
    """A request cannot be run as it stands: an option is unknown, contradictory or out of range."""


class NotSupported(NbinferError, NotImplementedError):  # noqa: N818 - a statement, not a failure
    """What was asked is real, but this engine, model or platform cannot do it."""


class ContextOverflow(RequestError):  # noqa: N818 - the field's term
    """The prompt does not fit the context. Nothing was decoded and nothing was cut.

    Attributes
    ----------
    prompt_tokens
        Tokens of the rendered prompt.
    context_size
        Tokens that one request may use, prompt and answer together.
    """

    def __init__(self, message: str, *, prompt_tokens: int = 0, context_size: int = 0) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.context_size = context_size


class TemplateError(RequestError):
    """The model's chat template failed, or tried something that a template may not do."""


class SchemaError(NbinferError, ValueError):
    """The output does not satisfy the schema: cut short, or not valid.

    ``raw`` holds the text as the model wrote it; ``result``, of an answer that was cut short, all of it with
    its counts.
    """

    def __init__(self, message: str, *, raw: str = "", result: Result | None = None) -> None:
        super().__init__(message)
        self.raw = raw
        self.result = result


class ModelNotFound(NbinferError, LookupError):  # noqa: N818 - as FileNotFoundError would read twice
    """No such model, file or alias; the message lists the nearest names."""


class ModelLoadError(NbinferError, RuntimeError):
    """The engine could not load the model; the message holds the likely cause and the fix."""


# The built-in one first: Python makes a MemoryError in its own way, which unpickling by ``__new__`` meets.
class DoesNotFit(MemoryError, NbinferError):  # noqa: N818 - the verdict's own words
    """The model needs more memory than there is; the message names the nearest setting that fits."""


class BackendUnavailable(NbinferError, RuntimeError):  # noqa: N818 - the status in words
    """The backend is not installed or not usable here; the message is the exact install line."""


class EngineError(NbinferError, RuntimeError):
    """The engine failed while running a request."""


class EngineClosed(EngineError):  # noqa: N818 - a state, not a failure
    """The model was unloaded while, or before, the request ran."""


class GGUFParseError(NbinferError, ValueError):
    """A GGUF file cannot be read: ``failed to parse GGUF: …``, with what is wrong and where."""

    def __init__(self, problem: str) -> None:
        # The bare problem stays the only argument, so that a pickled error comes back with the same message.
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"failed to parse GGUF: {self.problem}"


class SafetensorsParseError(NbinferError, ValueError):
    """A safetensors model cannot be read: ``failed to read safetensors: …``, with what is wrong."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"failed to read safetensors: {self.problem}"
