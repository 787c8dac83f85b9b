"""Text generation with vLLM in this process.

One thread steps vLLM's engine, which decodes many sequences at once and computes a beginning that prompts
share once. Callers put requests in and read streams. As many run as were asked for, and one more when
somebody waits at a cell; batch rows that arrive together run in the order of their prompts, so that those
that begin alike find each other in vLLM's cache.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import (
    NbinferError,
    NotSupported,
    RequestError,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest, ScoreRequest
from nbinfer.engines.images import has_images
from nbinfer.engines.plaintext import SEAM
from nbinfer.engines.prompts import check_length, only_text, rendered
from nbinfer.engines.protocol import EngineInfo, EngineLoad
from nbinfer.engines.stream import Stream
from nbinfer.engines.text import THINK_CLOSE, THINK_OPEN, TextAssembler
from nbinfer.engines.vllm.answers import Answer, Scoring
from nbinfer.engines.vllm.arguments import ALWAYS
from nbinfer.engines.vllm.host import Host, load_failure, words
from nbinfer.engines.vllm.pictures import with_pictures
from nbinfer.engines.vllm.sampling import Constraints
from nbinfer.engines.vllm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbinfer.contract.requests import Request
    from nbinfer.engines.vllm.answers import Job
    from nbinfer.engines.vllm.arguments import VllmArguments
    from nbinfer.engines.vllm.build import Device

CPU_BLOCK = 32
"""Tokens of one block of the cache on a CPU. Prompts share whole blocks: vLLM's own 128 are more than most
beginnings have, and 32 computes as fast."""


class CompletionEngine:
    """Serves completions of one model. See the module's description.

    Parameters
    ----------
    given
        What to load, in vLLM's words.
    variables
        The environment for the load.
    device
        What the installed vLLM was built for.
    threads
        CPU threads.
    exact
        Give the same text to the last bit, whatever ran before or runs beside: one request at a time, nothing
        kept of earlier ones.
    """

    def __init__(
        self,
        given: VllmArguments,
        variables: Mapping[str, str],
        *,
        name: str,
        device: Device,
        threads: int,
        digest: str = "",
        version: str = "",
        exact: bool = False,
    ) -> None:
        self._name, self._given, self._digest, self._version = name, given, digest, version
        settings = dict(given.engine)
        if device == "cpu":
            settings.setdefault("block_size", CPU_BLOCK)
        if exact:
            settings |= {"max_num_seqs": 1, "enable_prefix_caching": False}
        elif "max_num_seqs" in settings:
            settings["max_num_seqs"] += 1  # the seat of a cell
        self._exact = exact
        self._mixes = device != "cpu" or not given.adapters
        self._inbox: deque[Job] = deque()
        self._rows: deque[Job] = deque()
        self._cells: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._numbers = itertools.count()
        self._cancelled: set[Stream] = set()
        self._unfinished: set[Job] = set()
        self._generated = self._computed = 0
        self._llm: Any = None
        self._engine: Any = None
        self._host = self._make_host(settings, variables, threads)
        self._host.start()

    def _make_host(self, settings: Mapping[str, Any], variables: Mapping[str, str], threads: int) -> Host:
        """Return what loads the model and runs :meth:`_serve` in a thread."""
        return Host(
            self._name,
            {**settings, "max_logprobs": -1, "disable_log_stats": True, "use_tqdm_on_load": False},
            variables,
            threads=threads,
            prepare=self._prepare,
            serve=self._serve,
            stopped=self._fail_all,
        )

    def _prepare(self, llm: Any) -> None:
        """Read back what was loaded, and generate one token: some models fail only then."""
        self._llm = llm
        self._engine = engine = llm.llm_engine
        config = engine.vllm_config
        if "generate" not in engine.get_supported_tasks():
            raise NotSupported(f"{self._name} cannot continue text: load it for embedding or reranking.")
        generation = config.model_config.try_get_generation_config() or {}
        ends = generation.get("eos_token_id") or ()
        self._vocabulary = Vocabulary(
            engine.get_tokenizer(),
            name=self._name,
            size=config.model_config.get_vocab_size(),
            ends=[ends] if isinstance(ends, int) else ends,
            chat_template=self._given.chat_template,
        )
        self._constraints = Constraints(engine.get_tokenizer(), self._vocabulary.size)
        self._takes_images = bool(config.model_config.is_multimodal_model)
        seats = config.scheduler_config.max_num_seqs
        self._seats = seats if self._exact else max(1, seats - 1)
        self._adapters = _adapters(self._given)
        trained = config.model_config.hf_text_config.to_dict().get("max_position_embeddings")
        self.info = EngineInfo(
            backend="vllm",
            model=self._name,
            mode=Mode.COMPLETION,
            context_size=config.model_config.max_model_len,
            trained_context_size=trained,
            parallel=self._seats,
            digest=self._digest,
            version=self._version,
            effective=effective(config),
        )
        self._warm_up()

    def _warm_up(self) -> None:
        """Generate one token, as the last part of the load."""
        from vllm import SamplingParams

        # vLLM imports these at the first constraint: there they would warn, and ask for a compiler.
        for module in ("llguidance.torch", "llguidance.hf", "xgrammar"):
            with suppress(ImportError):
                import_module(module)
        try:
            params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1)
            self._engine.add_request("warm-up", {"prompt_token_ids": [0]}, params)
            while self._engine.has_unfinished_requests():
                self._engine.step()
        except Exception as e:
            raise load_failure(self._name, e) from e

    @property
    def alone(self) -> bool:
        """Whether this process can hold no second one of its kind; one that has died makes way."""
        return not self._host.closing

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._vocabulary.ends

    # -- callers' side ----------------------------------------------------------------------------------

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Return the exact prompt and its length in tokens, an image as its placeholder; runs nothing."""
        self._host.check_open()
        text, tokens, _ = self._prompt_of(request)
        return text, len(tokens)

    def submit(self, request: Request) -> Stream:
        """Start a request; returns at once. See :meth:`nbinfer.engines.protocol.Engine.submit`."""
        self._host.check_open()
        if isinstance(request, ScoreRequest):
            return self._start_scoring(request)
        if not isinstance(request, CompletionRequest):
            raise NotSupported(f"{self._name} is loaded for completion: load a model in the mode you need.")
        if request.n != 1:
            raise NotSupported("one request gives one answer here: submit it n times with different seeds.")
        return self._start(request)

    def _start(self, request: CompletionRequest) -> Stream:
        text, tokens, images = self._prompt_of(request)
        check_length(len(tokens), self.info)
        self._vocabulary.check(request.sampling.logit_bias, "logit_bias: token")
        if request.constraint is not None:
            self._constraints.check(request.constraint)
        free = request.constraint is None
        opened = request.messages is not None and text.rstrip().endswith(THINK_OPEN)
        if opened and request.reasoning_budget == 0:
            tokens, opened = [*tokens, *self._thought_end], False
        room = self.info.context_size - len(tokens)
        answer = Answer(
            request=request,
            stream=Stream(),
            model=self._name,
            tokens=tokens,
            prompt_text=text,
            images=images,
            assembler=TextAssembler(
                request.stop,
                reasoning=request.messages is not None and free,
                inside_reasoning=opened and free,
            ),
            seed=secrets.randbits(32) if request.sampling.seed is None else request.sampling.seed,
            limit=min(room, request.max_tokens or room),
            budget=request.reasoning_budget,
            thought_end=self._thought_end,
            ends=self._vocabulary.ends,
            constraints=self._constraints,
            adapter=self._adapter(request.adapter),
            submitted=time.perf_counter(),
        )
        return self._enqueue([answer])

    def _start_scoring(self, request: ScoreRequest) -> Stream:
        question = request.question()
        if has_images(question):
            raise NotSupported("answers are scored behind text only, not behind images.")
        _, tokens, _ = self._prompt_of(question)
        answers = [self._vocabulary.tokenize(a, special=False, add_special=False) for a in request.answers]
        check_length(len(tokens) + max(len(a) for a in answers), self.info)
        scoring = Scoring(
            stream=Stream(),
            model=self._name,
            tokens=tokens,
            answers=answers,
            ends=self._vocabulary.ends,
            submitted=time.perf_counter(),
            interactive=request.priority == "interactive",
            adapter=self._adapter(None),
        )
        return self._enqueue(scoring.nodes(), scoring)

    def _enqueue(self, jobs: Sequence[Any], whole: Any = None) -> Stream:
        stream = Stream(on_cancel=lambda: self._cancel(stream))
        (whole or jobs[0]).stream = stream
        with self._host.wake:
            self._host.check_open()
            self._inbox.extend(jobs)
            self._unfinished.update(jobs)
            self._host.wake.notify()
        return stream

    def _cancel(self, stream: Stream) -> None:
        with self._host.wake:
            self._cancelled.add(stream)
            self._host.wake.notify()

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = True) -> list[int]:
        """Token ids of a text; ``special`` reads control tokens written out in it."""
        self._host.check_open()
        return self._vocabulary.tokenize(text, special=special, add_special=add_special)

    def detokenize(self, tokens: list[int]) -> str:
        """The text of tokens, control tokens written out; raises ``RequestError`` for one that is none."""
        self._host.check_open()
        return self._vocabulary.text(tokens)

    def load(self) -> EngineLoad:
        """Return what is running now."""
        running = list(self._running.values())
        return EngineLoad(
            running=len(running),
            waiting=len(self._inbox) + len(self._rows) + len(self._cells),
            context_used=sum(job.n_tokens for job in running),
            tokens_generated=self._generated,
            prompt_tokens=self._computed,
        )

    def close(self) -> None:
        """End what runs with ``EngineClosed`` and give the memory back; idempotent."""
        self._host.close()

    def _prompt_of(self, request: CompletionRequest) -> tuple[str, list[int], list[Any]]:
        """The prompt's text, its tokens, and its images."""
        vocabulary = self._vocabulary
        if has_images(request):
            return self._prompt_with_images(request)
        if isinstance(request.prompt, tuple):
            tokens = list(request.prompt)
            return vocabulary.text(tokens), tokens, []
        if request.prompt is not None:
            return request.prompt, vocabulary.tokenize(request.prompt, special=True, add_special=True), []
        messages = request.messages or ()
        alone = only_text(messages) if vocabulary.template is None else None
        if alone is not None:
            return alone, vocabulary.tokenize(alone, special=False, add_special=True), []
        text = self._rendered(messages, request)
        return text.replace(SEAM, ""), vocabulary.tokenize_rendered(text), []

    def _prompt_with_images(self, request: CompletionRequest) -> tuple[str, list[int], list[Any]]:
        if not self._takes_images:
            raise NotSupported(f"{self._name} takes no images: load a vision model.")
        if request.messages is None:
            raise RequestError("images go with messages, not with a raw prompt.")
        messages, images = with_pictures(request)
        text = self._rendered(messages, request)
        return text.replace(SEAM, ""), self._vocabulary.tokenize_rendered(text), images

    def _rendered(self, messages: Sequence[Any], request: CompletionRequest) -> str:
        return rendered(
            self._vocabulary.template,
            messages,
            request,
            name=self._name,
            controls=self._vocabulary.controls,
            budget=request.reasoning_budget,
        )

    @cached_property
    def _thought_end(self) -> list[int]:
        return self._vocabulary.tokenize(f"\n{THINK_CLOSE}\n\n", special=True, add_special=False)

    def _adapter(self, asked: str | None) -> str | None:
        if asked is None:
            return ALWAYS if ALWAYS in self._adapters else None
        if asked not in self._adapters:
            known = ", ".join(self._adapters) or "none; give lora={name: folder} to nb.load"
            raise RequestError(f"there is no adapter {asked!r}. Loaded: {known}.")
        return asked

    # -- the engine's thread ----------------------------------------------------------------------------

    def _serve(self) -> None:
        host = self._host
        while True:
            with host.wake:
                while not (self._inbox or self._cancelled or host.closing or self._busy()):
                    host.wake.wait()
                if host.closing:
                    return
                new, self._inbox = self._inbox, deque()
                cancelled, self._cancelled = self._cancelled, set()
            self._cells.extend(job for job in new if job.interactive)
            self._rows.extend(sorted((job for job in new if not job.interactive), key=lambda job: job.order))
            if cancelled:
                self._drop(cancelled)
            self._admit()
            if self._running:
                self._step()

    def _busy(self) -> bool:
        return bool(self._running or self._rows or self._cells)

    def _drop(self, cancelled: set[Stream]) -> None:
        for queue in (self._cells, self._rows):
            for job in [job for job in queue if job.stream in cancelled]:
                queue.remove(job)
                self._interrupt(job)
        for key, job in [(key, job) for key, job in self._running.items() if job.stream in cancelled]:
            self._abort(key)
            self._interrupt(job)

    def _interrupt(self, job: Job) -> None:
        job.interrupt()
        self._unfinished.discard(job)

    def _abort(self, key: str) -> None:
        del self._running[key]
        self._engine.abort_request([key])

    def _admit(self) -> None:
        """Give seats to those that wait: cells first, which have one seat of their own."""
        for queue, seats in ((self._cells, self._seats + (not self._exact)), (self._rows, self._seats)):
            while queue and len(self._running) < seats and self._goes_with_the_others(queue[0]):
                self._add(queue.popleft())
            if queue:
                return

    def _goes_with_the_others(self, job: Job) -> bool:
        """Whether a job may run beside those that do.

        On a CPU, vLLM computes what has no adapter under the last one when both are in a batch.
        """
        other = next(iter(self._running.values()), None)
        return self._mixes or other is None or (other.adapter is None) == (job.adapter is None)

    def _add(self, job: Job) -> None:
        key = str(next(self._numbers))
        lora = self._adapters[job.adapter] if job.adapter is not None else None
        try:
            self._engine.add_request(key, job.prompt(), job.params(), lora_request=lora)
        except Exception as e:  # noqa: BLE001 - what vLLM refuses concerns this request only
            job.stream.fail(RequestError(f"vLLM refuses this request: {words(e)}"))
            self._unfinished.discard(job)
            return
        if job.started is None:
            job.started = time.perf_counter()
        self._running[key] = job

    def _step(self) -> None:
        for output in self._engine.step():
            job = self._running.get(output.request_id)
            if job is None:
                continue
            outcome = job.take(output)
            self._computed += outcome.prompt_tokens
            self._generated += outcome.generated
            if not (outcome.done or outcome.again or output.finished):
                continue
            if output.finished:
                del self._running[output.request_id]
            else:
                self._abort(output.request_id)
            if outcome.again:
                self._add(job)
            else:
                self._unfinished.discard(job)

    def _fail_all(self, error: NbinferError) -> None:
        """End every request that has no end yet, and let go of the model."""
        with self._host.wake:
            everyone, self._unfinished = self._unfinished, set()
            for queue in (self._inbox, self._cells, self._rows):
                queue.clear()
            self._running.clear()
        for job in everyone:
            job.stream.fail(error)
        engine, self._engine, self._llm = self._engine, None, None
        if engine is not None:
            engine.engine_core.shutdown()


def _adapters(given: VllmArguments) -> dict[str, Any]:
    if not given.adapters:
        return {}
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(given.adapters.items(), 1)
    }


def effective(config: Any) -> dict[str, Any]:
    """Return vLLM's own settings, read back: type, cache in tokens, batch size, threads."""
    import torch

    cache, scheduler = config.cache_config, config.scheduler_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_type": str(cache.cache_dtype),
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "block_size": cache.block_size,
        "prefix_caching": bool(cache.enable_prefix_caching),
        "batch_size": scheduler.max_num_batched_tokens,
        "device": str(config.device_config.device_type),
        "threads": torch.get_num_threads(),
        "quantization": config.model_config.quantization,
    }
