"""Embeddings and relevance scores with vLLM in this process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import (
    NbinferError,
    NotSupported,
    RequestError,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import EmbeddingRequest, RerankRequest
from nbinfer.contract.results import EmbeddingResult, Finished, PromptProgress, RerankResult
from nbinfer.engines.jobs import Jobs
from nbinfer.engines.prompts import check_texts
from nbinfer.engines.protocol import EngineInfo, EngineLoad
from nbinfer.engines.stream import Stream
from nbinfer.engines.vectors import as_asked, check_dims, nothing
from nbinfer.engines.vllm.generate import effective
from nbinfer.engines.vllm.host import Host, words
from nbinfer.engines.vllm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from nbinfer.contract.requests import CompletionRequest, Request
    from nbinfer.engines.vllm.arguments import VllmArguments

_AT_ONCE = 64
"""Texts given to vLLM together; between two such lots a request can be cancelled."""


@dataclass(eq=False, slots=True)
class _Job:
    request: EmbeddingRequest | RerankRequest
    tokens: list[list[int]]
    stream: Stream


class PooledEngine:
    """Serves embeddings, or relevance scores, of one model; one thread steps vLLM.

    Parameters
    ----------
    given
        What to load, in vLLM's words.
    variables
        The environment for the load.
    """

    def __init__(
        self,
        given: VllmArguments,
        variables: Mapping[str, str],
        *,
        mode: Mode,
        name: str,
        threads: int,
        digest: str = "",
        version: str = "",
    ) -> None:
        self._mode, self._name, self._digest, self._version = mode, name, digest, version
        self._jobs: Jobs[_Job] = Jobs(name)
        self._done_tokens = 0
        self._llm: Any = None
        self._host = self._make_host(given, variables, threads)
        self._host.start()

    def _make_host(self, given: VllmArguments, variables: Mapping[str, str], threads: int) -> Host:
        """Return what loads the model and runs :meth:`_serve` in a thread."""
        return Host(
            self._name,
            {**given.engine, "disable_log_stats": True, "use_tqdm_on_load": False},
            variables,
            threads=threads,
            prepare=self._prepare,
            serve=self._serve,
            stopped=self._fail_all,
            closed=self._jobs.close,
        )

    @property
    def alone(self) -> bool:
        """Whether this process can hold no second one of its kind; one that has died makes way."""
        return not self._host.closing

    def _prepare(self, llm: Any) -> None:
        """Read back what was loaded, and run it once: some models fail only then."""
        self._llm = llm
        config = llm.llm_engine.vllm_config
        tasks = set(llm.llm_engine.get_supported_tasks())
        # A model of vectors ranks as well: by the cosine of the query's and the document's.
        needed = {"embed"} if self._mode is Mode.EMBEDDING else {"classify", "embed"}
        if not tasks & needed:
            offered = ", ".join(sorted(tasks))
            raise NotSupported(f"{self._name} cannot do {self._mode}: vLLM offers {offered}.")
        labels = getattr(config.model_config.hf_config, "num_labels", 1)
        if self._mode is Mode.RERANKING and "classify" in tasks and labels != 1:
            raise NotSupported(f"{self._name} cannot rank: it sorts texts into {labels} classes.")
        self._vocabulary = Vocabulary(
            llm.llm_engine.get_tokenizer(), name=self._name, size=config.model_config.get_vocab_size()
        )
        found = self._vectors([[0]]) if self._mode is Mode.EMBEDDING else self._scores("a", ["b"])
        trained = config.model_config.hf_text_config.to_dict().get("max_position_embeddings")
        self.info = EngineInfo(
            backend="vllm",
            model=self._name,
            mode=self._mode,
            context_size=config.model_config.max_model_len,
            trained_context_size=trained,
            parallel=config.scheduler_config.max_num_seqs,
            dimensions=found.shape[-1] if self._mode is Mode.EMBEDDING else None,
            digest=self._digest,
            version=self._version,
            effective=effective(config),
        )

    # -- callers' side ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Start an embedding or reranking request. See :meth:`nbinfer.engines.protocol.Engine.submit`."""
        self._host.check_open()
        if isinstance(request, RerankRequest) and self._mode is Mode.RERANKING:
            tokens = [self._vocabulary.pair(request.query, document) for document in request.documents]
        elif isinstance(request, EmbeddingRequest) and self._mode is Mode.EMBEDDING:
            tokens = [self.tokenize(text, special=False) for text in request.texts]
            check_dims(request, self.info)
        else:
            raise NotSupported(f"{self._name} is loaded for {self._mode}: load a model in the mode you need.")
        check_texts(tokens, self.info)
        stream = Stream()
        self._jobs.put(_Job(request, tokens, stream))
        return stream

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Raise ``NotSupported``: a pooled model has no prompt."""
        del request
        raise NotSupported(f"{self._name} is loaded for {self._mode}: it has no prompt to show.")

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as this model would see it."""
        return len(self.tokenize(text, special=False))

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = False) -> list[int]:
        """Token ids of a text; ``special`` reads control tokens written out in it."""
        self._host.check_open()
        return self._vocabulary.tokenize(text, special=special, add_special=add_special)

    def load(self) -> EngineLoad:
        """Return what is running now."""
        return EngineLoad(
            running=self._jobs.running, waiting=self._jobs.waiting, prompt_tokens=self._done_tokens
        )

    def close(self) -> None:
        """End what runs with ``EngineClosed`` and give the memory back; idempotent."""
        self._jobs.close()
        self._host.close()

    # -- the engine's thread ----------------------------------------------------------------------------

    def _serve(self) -> None:
        self._jobs.serve(self._run, self._failure)

    @staticmethod
    def _failure(error: BaseException, job: _Job) -> NbinferError:
        del job
        if isinstance(error, NbinferError):
            return error
        if isinstance(error, ValueError):  # what vLLM refuses concerns this request only
            return RequestError(f"vLLM refuses this request: {words(error)}")
        raise error

    def _run(self, job: _Job) -> None:
        began = time.perf_counter()
        parts: list[Any] = []
        for lot in self._lots(job):
            if self._host.closing:
                raise self._jobs.unloaded()
            if job.stream.cancelled:
                job.stream.put(Finished(nothing(job.request, self.info, "interrupted")))
                return
            if isinstance(job.request, RerankRequest):
                documents = [job.request.documents[i] for i in lot]
                parts.append(self._scores(job.request.query, documents))
            else:
                parts.append(self._vectors([job.tokens[i] for i in lot]))
            self._done_tokens += sum(len(job.tokens[i]) for i in lot)
            job.stream.put(PromptProgress(lot.stop, len(job.tokens)))
        counts = tuple(len(ids) for ids in job.tokens)
        seconds = time.perf_counter() - began
        result: EmbeddingResult | RerankResult
        if isinstance(job.request, RerankRequest):
            scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
            result = RerankResult(scores=scores, n_tokens=counts, model=self._name, seconds=seconds)
        else:
            vectors = np.concatenate(parts) if parts else np.zeros((0, self.info.dimensions or 0), np.float32)
            vectors = as_asked(vectors, job.request)
            result = EmbeddingResult(vectors=vectors, n_tokens=counts, model=self._name, seconds=seconds)
        job.stream.put(Finished(result))

    @staticmethod
    def _lots(job: _Job) -> Iterator[range]:
        for start in range(0, len(job.tokens), _AT_ONCE):
            yield range(start, min(start + _AT_ONCE, len(job.tokens)))

    def _vectors(self, texts: list[list[int]]) -> NDArray[np.float32]:
        """Vectors as the model gives them, float32 of shape (texts, dimensions); zeros for an empty text."""
        filled = [i for i, ids in enumerate(texts) if ids]
        if not filled:
            return np.zeros((len(texts), self.info.dimensions or 0), np.float32)
        made = self._computed([texts[i] for i in filled])
        vectors = np.zeros((len(texts), made.shape[1]), np.float32)
        vectors[filled] = made
        return vectors

    def _computed(self, texts: list[list[int]]) -> NDArray[np.float32]:
        """Vectors of texts that have tokens, as the model gives them; shape (texts, dimensions)."""
        from vllm import PoolingParams

        asked = [{"prompt_token_ids": ids} for ids in texts]
        # Cut and normalised here: vLLM does either for some models only.
        found = self._llm.embed(asked, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        return np.stack([np.asarray(each.outputs.embedding, np.float32) for each in found])

    def _scores(self, query: str, documents: list[str]) -> Any:
        """Scores of documents, float32 of shape (documents,)."""
        found = self._llm.score(query, documents, use_tqdm=False)
        return np.array([each.outputs.score for each in found], np.float32)

    def _fail_all(self, error: NbinferError) -> None:
        """End every request that has no end yet, and let go of the model."""
        self._jobs.fail(error)
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
