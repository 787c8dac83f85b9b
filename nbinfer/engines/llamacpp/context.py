"""A llama.cpp context: its settings, what it really uses, and one decode call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import ConfigError, EngineError, ModelLoadError
from nbinfer.engines.llamacpp.library import LOG, abort_function, default_threads, library
from nbinfer.gguf.types import tensor_type_numbers
from nbinfer.memory import defaults
from nbinfer.memory.settings import KV_TYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nbinfer.engines.llamacpp.weights import Weights

_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ

POOLINGS = ("mean", "cls", "last", "none")
"""How an embedding model makes one vector of a text's; ``none`` leaves one for each token."""

OK, NO_SPACE, ABORTED = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSettings:
    """What was asked of the context; None lets nbinfer choose. See :func:`open_engine`."""

    context_size: int | None = None
    parallel: int | None = None
    kv_type: str | None = None
    threads: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    flash_attention: bool | None = None
    pooling: str | None = None

    def __post_init__(self) -> None:
        for name in ("context_size", "parallel", "threads", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name}={value!r}: it is a whole number.")
        if self.context_size is not None and self.context_size != -1 and self.context_size < 1:
            raise ConfigError(
                f"context_size={self.context_size}: it must be at least 1 token, or -1 for the maximum."
            )
        if self.kv_type is not None and self.kv_type not in KV_TYPES:
            raise ConfigError(f"kv_type={self.kv_type!r} is unknown: use one of {', '.join(KV_TYPES)}.")
        for name in ("threads", "batch_size", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: it must be at least 1.")
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ConfigError(f"pooling={self.pooling!r} is unknown: use one of {', '.join(POOLINGS)}.")
        if self.parallel is not None and not 1 <= self.parallel <= _MAX_SEQUENCES:
            raise ConfigError(f"parallel={self.parallel}: it must be between 1 and {_MAX_SEQUENCES}.")


class Context:
    """One llama.cpp context and its batch buffer. Owned by one thread after it is made.

    Parameters
    ----------
    parallel
        Sequences that fit at once.
    pooled
        For embeddings: one vector per sequence instead of logits per token.
    extra_outputs
        Rows of logits in one batch beyond one per sequence: the guesses of speculative decoding.
    """

    def __init__(
        self,
        weights: Weights,
        settings: ContextSettings,
        *,
        parallel: int,
        pooled: bool = False,
        extra_outputs: int = 0,
    ) -> None:
        lib = self._lib = library()
        self._weights = weights
        trained = weights.trained_context_size
        asked = settings.context_size
        usual_size = defaults.POOLED_CONTEXT if pooled else defaults.CONTEXT
        size = trained if asked == -1 else asked or min(trained, usual_size)
        threads = settings.threads or default_threads()
        params = lib.llama_context_default_params()
        params.n_ctx = size
        params.n_batch = (
            size if pooled else min(settings.batch_size or defaults.BATCH, max(size, defaults.LEAST_BATCH))
        )
        flash = defaults.flash_attention(
            asked=settings.flash_attention,
            on_gpu=bool(lib.llama_supports_gpu_offload()) and weights.gpu_layers != 0,
            kv_type=settings.kv_type,
            context_size=size,
            pooled=pooled,
        )
        usual = defaults.PLAIN_MICRO_BATCH if flash is False else defaults.MICRO_BATCH
        params.n_ubatch = size if pooled else min(settings.micro_batch or usual, params.n_batch)
        params.n_seq_max = parallel
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = {None: -1, False: 0, True: 1}[flash]
        self.flash_attention = flash is not False
        params.type_k = params.type_v = tensor_type_numbers()[(settings.kv_type or "f16").upper()]
        params.embeddings = pooled
        if settings.pooling is not None:
            params.pooling_type = getattr(lib, f"LLAMA_POOLING_TYPE_{settings.pooling.upper()}")
        params.no_perf = True
        # Both save memory for nothing lost: the window's cells are enough without context shifting, and one
        # row of logits per sequence is all that generation reads.
        params.swa_full = False
        if not pooled:
            params.n_outputs_max = parallel + extra_outputs
        params.op_offload = bool(lib.llama_supports_gpu_offload())
        self._abort_flag = ctypes.create_string_buffer(2)
        params.abort_callback = abort_function()
        params.abort_callback_data = ctypes.cast(self._abort_flag, ctypes.c_void_p)
        since = LOG.mark()
        self.pointer: Any = lib.llama_init_from_model(weights.pointer, params)
        if not self.pointer:
            raise ModelLoadError(_context_failure(size, LOG.errors(since)))
        self.memory = lib.llama_get_memory(self.pointer)
        self.size = int(lib.llama_n_ctx(self.pointer))
        self.n_batch = int(lib.llama_n_batch(self.pointer))
        self.n_ubatch = int(lib.llama_n_ubatch(self.pointer))
        self.threads = threads
        self.n_vocab = weights.n_vocab
        self._make_batch()

    def _make_batch(self) -> None:
        """Lay out llama.cpp's batch over numpy arrays, so that filling it is slicing."""
        lib, n = self._lib, self.n_batch
        self._tokens = np.zeros(n, np.int32)
        self._positions = np.zeros(n, np.int32)
        self._outputs = np.zeros(n, np.int8)
        self._sequences = np.zeros(n, np.int32)
        self._sequence_counts = np.ones(n, np.int32)
        addresses = self._sequences.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        self._sequence_pointers = addresses.astype(np.uintp)
        self._batch = lib.llama_batch()
        kinds = dict(lib.llama_batch._fields_)
        for field, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._sequence_counts),
            ("seq_id", self._sequence_pointers),
            ("logits", self._outputs),
        ):
            setattr(self._batch, field, ctypes.cast(array.ctypes.data, kinds[field]))
        self._n = 0

    def effective(self) -> dict[str, Any]:
        """The settings llama.cpp really uses."""
        lib = self._lib
        return {
            "context_size": self.size,
            "parallel": int(lib.llama_n_seq_max(self.pointer)),
            "batch_size": self.n_batch,
            "micro_batch": self.n_ubatch,
            "flash_attention": self.flash_attention,
            "threads": int(lib.llama_n_threads(self.pointer)),
            "gpu_offload": bool(lib.llama_supports_gpu_offload()),
        }

    # -- one batch --------------------------------------------------------------------------------------

    def add(
        self, sequence: int, tokens: NDArray[np.int32] | Sequence[int], position: int, *, output: bool
    ) -> int:
        """Append tokens of one sequence; with ``output`` the last one gets logits.

        Returns the index of that last token in the batch.
        """
        n, first = len(tokens), self._n
        last = first + n - 1
        self._tokens[first : last + 1] = tokens
        self._positions[first : last + 1] = np.arange(position, position + n, dtype=np.int32)
        self._outputs[first : last + 1] = 0
        self._outputs[last] = output
        self._sequences[first : last + 1] = sequence
        self._n = last + 1
        return last

    def mark_outputs(self, n: int) -> None:
        """Make the last ``n`` tokens of the batch outputs."""
        self._outputs[self._n - n : self._n] = 1

    def mark_all_outputs(self) -> None:
        """Make every token of the batch an output, as pooling wants it."""
        self._outputs[: self._n] = 1

    def decode(self) -> int:
        """Run the batch: ``OK``, ``NO_SPACE`` or ``ABORTED``. The batch is empty afterwards.

        Raises
        ------
        EngineError
            llama.cpp failed for any other reason.
        """
        self._batch.n_tokens, self._n = self._n, 0
        since = LOG.mark()
        code = int(self._lib.llama_decode(self.pointer, self._batch))
        if code not in (OK, NO_SPACE, ABORTED):
            lines = LOG.errors(since)
            reason = lines[-1] if lines else f"llama_decode returned {code}"
            raise EngineError(f"llama.cpp failed while decoding: {reason}")
        return code

    def clear_batch(self) -> None:
        """Forget what :meth:`add` collected."""
        self._n = 0

    def logits(self, index: int) -> NDArray[np.float32]:
        """Logits at a batch index, float32 of shape (vocabulary,); valid until the next decode."""
        pointer = self._lib.llama_get_logits_ith(self.pointer, index)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if not address:
            raise EngineError(f"llama.cpp has no logits at batch index {index}.")
        return _floats(address, self.n_vocab)

    def pooled_output(self, sequence: int, size: int) -> NDArray[np.float32]:
        """Copy of a sequence's pooled output, float32 of shape (size,)."""
        pointer = self._lib.llama_get_embeddings_seq(self.pointer, sequence)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if not address:
            raise EngineError("llama.cpp returned no pooled output: the model may not be an embedding model.")
        return _floats(address, size).copy()

    def token_outputs(self, first: int, n: int, size: int) -> NDArray[np.float32]:
        """Copy of the vectors of ``n`` tokens of the batch, float32 of shape (n, size)."""
        rows = np.empty((n, size), np.float32)
        for i in range(n):
            pointer = self._lib.llama_get_embeddings_ith(self.pointer, first + i)
            address = ctypes.cast(pointer, ctypes.c_void_p).value
            if not address:
                raise EngineError("llama.cpp returned no vector for a token.")
            rows[i] = _floats(address, size)
        return rows

    # -- memory of sequences ----------------------------------------------------------------------------

    def drop(self, sequence: int, start: int = 0) -> bool:
        """Forget a sequence from position ``start`` on; False when this kind of memory cannot."""
        if self.memory is None:
            return True
        return bool(self._lib.llama_memory_seq_rm(self.memory, sequence, start, -1))

    def copy(self, source: int, target: int, length: int) -> None:
        """Let ``target`` share the first ``length`` positions of ``source``; no data is copied."""
        self._lib.llama_memory_seq_cp(self.memory, source, target, 0, length)

    def first_position(self, sequence: int) -> int:
        """The oldest position whose memory is complete; -1 where the sequence holds nothing."""
        return int(self._lib.llama_memory_seq_pos_min(self.memory, sequence))

    def state(self, sequence: int) -> NDArray[np.uint8]:
        """Copy of a sequence's memory, uint8 of shape (bytes,); empty when it cannot be copied."""
        lib = self._lib
        buffer = np.empty(int(lib.llama_state_seq_get_size(self.pointer, sequence)), np.uint8)
        written = lib.llama_state_seq_get_data(self.pointer, _bytes(buffer), len(buffer), sequence)
        return buffer[: int(written)]

    def restore(self, sequence: int, state: NDArray[np.uint8]) -> bool:
        """Replace a sequence's memory by a copy made of one with the same weights and settings.

        False when there is no room for it, or when it does not fit this context.
        """
        read = self._lib.llama_state_seq_set_data(self.pointer, _bytes(state), len(state), sequence)
        return int(read) > 0

    def clear(self) -> None:
        """Forget everything."""
        if self.memory is not None:
            self._lib.llama_memory_clear(self.memory, True)

    # -- from other threads -----------------------------------------------------------------------------

    def request_abort(self) -> None:
        """Make the running decode return ``ABORTED`` soon; callable from any thread."""
        self._abort_flag[0] = b"\x01"

    def reset_abort(self) -> None:
        """Take the request back."""
        self._abort_flag[0] = b"\x00"

    def close(self) -> None:
        """Free the context; idempotent."""
        if self.pointer:
            self._lib.llama_free(self.pointer)
            self.pointer = None


def engine_version() -> str:
    """Version of the installed llama.cpp bindings."""
    try:
        return f"llama.cpp {version('llama-cpp-python')}"
    except PackageNotFoundError:
        return "llama.cpp"


def _floats(address: int, n: int) -> NDArray[np.float32]:
    """A view over ``n`` floats of llama.cpp's memory."""
    memory: Any = (ctypes.c_float * n).from_address(address)
    return np.frombuffer(memory, np.float32)


def _bytes(buffer: NDArray[np.uint8]) -> Any:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _context_failure(size: int, errors: list[str]) -> str:
    reason = errors[-1] if errors else "no reason given"
    return (
        f"llama.cpp could not make a context of {size:,} tokens: {reason[:200]}\n"
        f"Try a smaller one (context_size={max(512, size // 2)}), kv_type='q8_0', or unload other models."
    )
