"""Embeddings and reranking: one pooled output per text, texts packed into small batches."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import (
    EngineError,
    NbinferError,
    NotSupported,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import EmbeddingRequest, RerankRequest
from nbinfer.contract.results import EmbeddingResult, Finished, PromptProgress, RerankResult
from nbinfer.engines.alive import closed_on_error, register
from nbinfer.engines.jobs import Jobs
from nbinfer.engines.llamacpp.context import OK, Context, engine_version
from nbinfer.engines.prompts import check_texts
from nbinfer.engines.protocol import EngineInfo, EngineLoad
from nbinfer.engines.stream import Stream
from nbinfer.engines.vectors import as_asked, check_dims, nothing
from nbinfer.memory import defaults

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbinfer.contract.requests import CompletionRequest, Request
    from nbinfer.engines.llamacpp.context import ContextSettings
    from nbinfer.engines.llamacpp.weights import Weights

CPU_PACK_TOKENS = 128
"""The best of 16 to 512 for short sentences: flash attention on a CPU needs tiles of 64 tokens, and attends
over the whole pack."""
GPU_PACK_TOKENS = 2048
_POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}  # llama_pooling_type


@dataclass(eq=False, slots=True)
class _Job:
    request: EmbeddingRequest | RerankRequest
    tokens: list[NDArray[np.int32]]
    stream: Stream


class PooledEngine:
    """Serves embeddings, or relevance scores, of one model; one thread owns the context."""

    def __init__(
        self, weights: Weights, settings: ContextSettings, *, mode: Mode, name: str, digest: str = ""
    ) -> None:
        lib = weights._lib  # noqa: SLF001 - the same engine's other half
        self._lib = lib
        self._weights = weights
        self._name = name
        parallel = 1 if weights.has_recurrent_state else settings.parallel or defaults.POOLED_PARALLEL
        self._context = Context(weights, settings, parallel=parallel, pooled=True)
        with closed_on_error(self._context):
            self._prepare(mode, name, digest, parallel, settings.pooling)
        self._thread = threading.Thread(target=self._run, name=f"nbinfer-{name}", daemon=True)
        self._thread.start()
        register(self)

    def _prepare(self, mode: Mode, name: str, digest: str, parallel: int, asked: str | None) -> None:
        lib, weights = self._lib, self._weights
        trained = weights.trained_context_size
        pooling = int(lib.llama_pooling_type(self._context.pointer))
        ranks = pooling == lib.LLAMA_POOLING_TYPE_RANK
        none = pooling == lib.LLAMA_POOLING_TYPE_NONE
        self._per_token = none and asked == "none" and mode == Mode.EMBEDDING
        if (none and not self._per_token) or ranks != (mode == Mode.RERANKING):
            self._context.close()
            can = "reranking" if ranks else "completion" if none else "embedding"
            more = "" if ranks or mode != Mode.EMBEDDING else " Or say how to pool: pooling='mean' or 'last'."
            raise NotSupported(
                f"{name} cannot do {mode}: its file says it is made for {can}. Use mode='{can}'.{more}"
            )
        # A ranking model gives as many numbers as it has labels: reading a vector would run past the end.
        self._size = int(lib.llama_model_n_cls_out(weights.pointer)) if ranks else weights.embedding_size
        gpu = bool(lib.llama_supports_gpu_offload())
        self._pack_tokens = min(self._context.n_ubatch, GPU_PACK_TOKENS if gpu else CPU_PACK_TOKENS)
        self.info = EngineInfo(
            backend="llamacpp",
            model=name,
            mode=Mode(mode),
            context_size=min(self._context.n_ubatch, trained),
            trained_context_size=trained,
            parallel=parallel,
            dimensions=None if ranks else self._size,
            digest=digest,
            version=engine_version(),
            effective={**self._context.effective(), "pooling": _POOLINGS.get(pooling, "unknown")},
        )
        self._jobs: Jobs[_Job] = Jobs(name)
        self._forked = False
        self._done_tokens = 0

    @property
    def context_pointer(self) -> Any:
        """llama.cpp's own context, for its memory breakdown."""
        return self._context.pointer

    # -- callers' side ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Start an embedding or reranking request. See :meth:`nbinfer.engines.protocol.Engine.submit`."""
        with self._weights.in_use():
            return self._start(request)

    def _start(self, request: Request) -> Stream:
        if isinstance(request, RerankRequest) and self.info.mode == Mode.RERANKING:
            tokens = [self._pair(request.query, document) for document in request.documents]
        elif isinstance(request, EmbeddingRequest) and self.info.mode == Mode.EMBEDDING:
            tokens = [self._weights.tokenize(text, special=False, add_special=True) for text in request.texts]
            check_dims(request, self.info)
        else:
            raise NotSupported(
                f"{self._name} is loaded for {self.info.mode}: load a model in the mode you need."
            )
        check_texts(tokens, self.info)
        stream = Stream()
        self._jobs.put(_Job(request, tokens, stream))
        return stream

    def _pair(self, query: str, document: str) -> NDArray[np.int32]:
        """Tokens of one query/document pair, as the model was trained on them."""
        weights = self._weights
        template = weights.chat_template("rerank")
        if template is not None:
            text = template.replace("{query}", query).replace("{document}", document)
            return weights.tokenize(text, special=True, add_special=True)
        parts: list[NDArray[np.int32]] = []
        begin, separator, end = (weights.special_token(name) for name in ("bos", "sep", "eos"))
        separator = end if separator is None else separator
        for mark, text in ((begin, query), (separator, document)):
            if mark is not None:
                parts.append(np.array([mark], np.int32))
            parts.append(weights.tokenize(text, special=False, add_special=False))
        if end is not None:
            parts.append(np.array([end], np.int32))
        return np.concatenate(parts)

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Raise ``NotSupported``: a pooled model has no prompt."""
        del request
        raise NotSupported(f"{self._name} is loaded for {self.info.mode}: it has no prompt to show.")

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as this model would see it."""
        with self._weights.in_use():
            return len(self._weights.tokenize(text, special=False, add_special=True))

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text; ``special`` reads control tokens written out in it."""
        with self._weights.in_use():
            tokens = self._weights.tokenize(text, special=special, add_special=add_special)
        return [int(token) for token in tokens]

    def load(self) -> EngineLoad:
        """Return what is running now."""
        return EngineLoad(
            running=self._jobs.running, waiting=self._jobs.waiting, prompt_tokens=self._done_tokens
        )

    def close(self) -> None:
        """End what runs with ``EngineClosed`` and free the memory; idempotent."""
        if self._forked:
            return
        self._jobs.close()
        self._context.request_abort()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """Refuse all use: this is a forked child, where the engine's thread does not exist."""
        self._forked = True
        self._weights.abandon()

    # -- the engine's thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._jobs.serve(self._serve, self._failure)
        finally:
            self._jobs.fail()
            self._context.close()
            self._weights.close()

    def _failure(self, error: BaseException, job: _Job) -> NbinferError:
        del job
        if isinstance(error, NbinferError):
            return self._jobs.unloaded() if self._jobs.closing else error
        return EngineError(f"the engine failed: {error!r}")

    def _serve(self, job: _Job) -> None:
        began = time.perf_counter()
        counts = tuple(len(t) for t in job.tokens)
        # Where the vectors of each text begin.
        starts = np.concatenate([[0], np.cumsum(counts)]) if self._per_token else np.arange(len(counts) + 1)
        out = np.zeros((int(starts[-1]), self._size), np.float32)
        done = 0
        for pack in self._packs(job.tokens):
            if self._jobs.closing:
                raise self._jobs.unloaded()
            if job.stream.cancelled:
                job.stream.put(Finished(nothing(job.request, self.info, "interrupted")))
                return
            self._decode_pack(pack, job.tokens, starts, out)
            done += len(pack)
            job.stream.put(PromptProgress(done, len(job.tokens)))
        seconds = time.perf_counter() - began
        if isinstance(job.request, RerankRequest):
            job.stream.put(
                Finished(
                    RerankResult(scores=out[:, 0].copy(), n_tokens=counts, model=self._name, seconds=seconds)
                ),
            )
            return
        vectors = as_asked(out, job.request)
        job.stream.put(
            Finished(EmbeddingResult(vectors=vectors, n_tokens=counts, model=self._name, seconds=seconds))
        )

    def _packs(self, tokens: list[NDArray[np.int32]]) -> list[list[int]]:
        """Group texts so that a pack stays below the best token count (a long text is a pack by itself)."""
        packs: list[list[int]] = []
        size = 0
        for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
            n = len(tokens[i])
            if not packs or size + n > self._pack_tokens or len(packs[-1]) >= self.info.parallel:
                packs.append([])
                size = 0
            packs[-1].append(i)
            size += n
        return packs

    def _decode_pack(
        self,
        pack: list[int],
        tokens: list[NDArray[np.int32]],
        starts: NDArray[np.int64],
        out: NDArray[np.float32],
    ) -> None:
        context = self._context
        context.clear()
        filled: list[tuple[int, int, int]] = []
        for i in pack:
            if len(tokens[i]):
                last = context.add(len(filled), tokens[i], 0, output=True)
                filled.append((len(filled), i, last + 1 - len(tokens[i])))
        if not filled:
            return
        context.mark_all_outputs()
        if context.decode() != OK:
            raise EngineError("llama.cpp stopped while computing embeddings.")
        for sequence, i, first in filled:
            at, n = starts[i], len(tokens[i])
            if self._per_token:
                out[at : at + n] = context.token_outputs(first, n, self._size)
            else:
                out[at] = context.pooled_output(sequence, self._size)
            self._done_tokens += n
