"""An engine that does what a script says, for every test above the engine.

It is a whole :class:`nbinfer.engines.protocol.Engine`: requests run on its own threads, stop when cancelled,
fail when it is closed, and are refused when they do not fit. Only the model is missing.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nbinfer.contract.errors import ContextOverflow, EngineClosed, NotSupported
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import (
    CompletionRequest,
    EmbeddingRequest,
    ImageRequest,
    Request,
    RerankRequest,
    ScoreRequest,
)
from nbinfer.contract.results import (
    Delta,
    EmbeddingResult,
    Finished,
    PromptProgress,
    RerankResult,
    Result,
    ScoreResult,
    Timings,
    TokenLogprob,
    Usage,
)
from nbinfer.engines.protocol import EngineInfo, EngineLoad
from nbinfer.engines.stream import AnyResult, Stream
from nbinfer.engines.vectors import nothing

if TYPE_CHECKING:
    from nbinfer.contract.results import FinishReason

HANG = math.inf
"""Script item: no further token until the request is cancelled or the engine closed."""

Step: TypeAlias = str | float | Exception | Delta | threading.Event
"""One step of a script.

``str`` is one token of the answer; a ``Delta`` too, with its own flags (``reasoning=True``); a ``float``
waits so many seconds; an ``Exception`` ends the request with it; an ``Event`` waits until the test sets it.
All waits end early on cancel and close.
"""

Asked: TypeAlias = CompletionRequest | EmbeddingRequest | RerankRequest | ScoreRequest
Script: TypeAlias = list[str] | Callable[[CompletionRequest], Iterable[Any]]
"""Tokens, or a function from the request to steps (``Any``, because a mixed list is typed as of objects)."""

_MODES: dict[type, Mode] = {
    CompletionRequest: Mode.COMPLETION,
    ScoreRequest: Mode.COMPLETION,
    EmbeddingRequest: Mode.EMBEDDING,
    RerankRequest: Mode.RERANKING,
}


def count_tokens(text: str) -> int:
    """Tokens of the fake's tokenizer: one per word."""
    return len(text.split())


def echo(request: CompletionRequest) -> Iterable[Step]:
    """Script: answer with the last message (or the prompt); one of the choices where there are choices."""
    text = _last_text(request)
    if request.constraint is not None and request.constraint.kind == "choices":
        choices: tuple[str, ...] = request.constraint.value
        # A choice that the prompt names, else one picked by the prompt: rows differ, runs do not.
        named = [choice for choice in choices if choice in text]
        return [named[0] if named else choices[_digest(text)[0] % len(choices)]]
    return re.findall(r"\S+\s*|\s+", text)


def vector(text: str, dimensions: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the fake's embedding of ``text``, shape (dimensions,): the same in every process.

    Texts that share words are near each other, so that nearest neighbours mean something.
    """
    total = 0.05 * _noise(text, dimensions)
    for word in re.findall(r"\w+", text.lower()):
        total = total + _noise(word, dimensions)
    return total.astype(np.float32)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _noise(text: str, dimensions: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(int.from_bytes(_digest(text), "big")).standard_normal(dimensions)


def _last_text(request: CompletionRequest) -> str:
    if request.messages is not None:
        return str(request.messages[-1].get("content", ""))
    return request.prompt if isinstance(request.prompt, str) else " ".join(map(str, request.prompt or ()))


@dataclass
class _Job:
    request: Asked
    submitted: float
    stream: Stream = field(init=False)
    stop: threading.Event = field(default_factory=threading.Event)
    started: bool = False


class FakeEngine:
    """An engine whose answers are scripted.

    Parameters
    ----------
    script
        Tokens to answer every completion with, or a function from the request to its steps
        (see ``Step``). Default: :func:`echo`.
    context_size
        Tokens (words) for prompt and answer together; a longer prompt raises ``ContextOverflow``.
    parallel
        Requests that run at once; others wait, interactive ones first.
    dimensions
        Length of an embedding.
    mode
        What the engine serves; other requests raise ``NotSupported``. None: everything.

    Attributes
    ----------
    requests
        Every request that was accepted, in order.
    cancelled
        How many requests were cancelled.
    most_running
        The largest number of requests that ran at once.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        context_size: int = 512,
        parallel: int = 4,
        dimensions: int = 8,
        mode: Mode | None = None,
        model: str = "fake",
    ) -> None:
        self.script: Script = echo if script is None else script
        self.requests: list[Asked] = []
        self.cancelled = 0
        self.most_running = 0
        self.closed = False
        self._mode = mode
        self._info = EngineInfo(
            backend="fake",
            model=model,
            mode=mode or Mode.COMPLETION,
            context_size=context_size,
            trained_context_size=context_size,
            parallel=parallel,
            dimensions=dimensions,
            digest=f"sha256:{hashlib.sha256(model.encode()).hexdigest()}",
            version="1.0",
            effective={"threads": parallel},
        )
        self._lock = threading.Condition()
        self._waiting: list[tuple[bool, int, _Job]] = []
        self._running: list[_Job] = []
        self._threads: list[threading.Thread] = []
        self._tokens_generated = 0
        self._prompt_tokens = 0

    # -- the Engine protocol ----------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, request: Request) -> Stream:
        if isinstance(request, ImageRequest):
            raise NotSupported("the fake engine makes no images.")
        self._check(request)
        job = _Job(request, time.perf_counter())
        job.stream = Stream(on_cancel=lambda: self._cancel(job))
        with self._lock:
            if self.closed:
                raise EngineClosed(f"{self._info.model} was unloaded; load it again.")
            self.requests.append(request)
            heapq.heappush(self._waiting, (request.priority == "batch", len(self.requests), job))
            if len(self._threads) < self._info.parallel:
                thread = threading.Thread(target=self._work, name="fake-engine", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._lock.notify()
        return job.stream

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        if request.messages is None:
            prompt = _last_text(request)
        else:
            lines = [f"{message['role']}: {message.get('content', '')}" for message in request.messages]
            prompt = "\n".join([*lines, "assistant: "])
        return prompt, count_tokens(prompt)

    def load(self) -> EngineLoad:
        with self._lock:
            return EngineLoad(
                running=len(self._running),
                waiting=len(self._waiting),
                context_used=0,
                tokens_generated=self._tokens_generated,
                prompt_tokens=self._prompt_tokens,
            )

    def close(self) -> None:
        with self._lock:
            self.closed = True
            jobs = [*self._running, *(job for _, _, job in self._waiting)]
            self._waiting.clear()
            self._lock.notify_all()
        for job in jobs:
            job.stream.fail(EngineClosed(f"{self._info.model} was unloaded while the request ran."))
            job.stop.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)

    # -- inside -----------------------------------------------------------------------------------------

    def _check(self, request: Asked) -> None:
        needed = _MODES[type(request)]
        if self._mode is not None and self._mode is not needed:
            raise NotSupported(f"{self._info.model} is loaded for {self._mode}; this request needs {needed}.")
        if isinstance(request, ScoreRequest):
            answers = max(map(count_tokens, request.answers))
            longest, limit = self.render(request.question())[1] + answers, self._info.context_size
        elif isinstance(request, CompletionRequest):
            if request.n != 1:
                raise NotSupported("the fake engine gives one answer per request.")
            # The answer needs room for one token at least.
            longest, limit = self.render(request)[1], self._info.context_size - 1
        elif isinstance(request, EmbeddingRequest):
            longest, limit = max(map(count_tokens, request.texts), default=0), self._info.context_size
        else:
            longest = max(map(count_tokens, request.documents), default=0) + count_tokens(request.query)
            limit = self._info.context_size
        if longest > limit:
            size = self._info.context_size
            raise ContextOverflow(
                f"the prompt has {longest} tokens; the context holds {size}.",
                prompt_tokens=longest,
                context_size=size,
            )

    def _cancel(self, job: _Job) -> None:
        with self._lock:
            self.cancelled += 1
            job.stop.set()
            waiting = not job.started
            if waiting:
                self._waiting = [entry for entry in self._waiting if entry[2] is not job]
                heapq.heapify(self._waiting)
        if waiting:
            job.stream.put(Finished(_interrupted(job.request, self._info)))

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self.closed:
                    self._lock.wait()
                if self.closed:
                    return
                job = heapq.heappop(self._waiting)[2]
                job.started = True
                self._running.append(job)
                self.most_running = max(self.most_running, len(self._running))
            last: Finished | Exception
            try:
                last = Finished(self._run(job))
            except Exception as error:  # noqa: BLE001 - whatever the script raises is the request's error
                last = error
            # Before the reader can wake up: who holds a result sees the engine idle.
            with self._lock:
                self._running.remove(job)
            if isinstance(last, Finished):
                job.stream.put(last)
            else:
                job.stream.fail(last)

    def _run(self, job: _Job) -> AnyResult:
        request = job.request
        began = time.perf_counter()
        if isinstance(request, EmbeddingRequest):
            dims = min(request.dims or self._info.dimensions or 1, self._info.dimensions or 1)
            vectors = np.zeros((len(request.texts), dims), np.float32)
            for i, text in enumerate(request.texts):
                full = vector(text, self._info.dimensions or 1)[:dims]
                vectors[i] = full / np.linalg.norm(full) if request.normalize else full
            counts = tuple(map(count_tokens, request.texts))
            seconds = time.perf_counter() - began
            return EmbeddingResult(vectors=vectors, n_tokens=counts, model=self._info.model, seconds=seconds)
        if isinstance(request, ScoreRequest):
            prompt, prompt_tokens = self.render(request.question())
            # An answer that the prompt names is e times e times as likely as one that it does not.
            logprobs = [
                (-1.0 if answer in prompt else -3.0) - len(answer) / 1e6 for answer in request.answers
            ]
            return ScoreResult(
                logprobs=np.asarray(logprobs, np.float64), prompt_tokens=prompt_tokens, model=self._info.model
            )
        if isinstance(request, RerankRequest):
            query = set(request.query.lower().split())
            scores = [
                len(query & set(document.lower().split())) / (1 + count_tokens(document))
                for document in request.documents
            ]
            counts = tuple(
                count_tokens(request.query) + count_tokens(document) for document in request.documents
            )
            seconds = time.perf_counter() - began
            return RerankResult(
                scores=np.asarray(scores, np.float32),
                n_tokens=counts,
                model=self._info.model,
                seconds=seconds,
            )
        return self._complete(job, request, began)

    def _complete(self, job: _Job, request: CompletionRequest, began: float) -> Result:
        prompt, prompt_tokens = self.render(request)
        room = self._info.context_size - prompt_tokens
        answer = _Answer(job, request)
        job.stream.put(PromptProgress(prompt_tokens, prompt_tokens))
        prompt_done = time.perf_counter()
        steps = self.script(request) if callable(self.script) else self.script
        reason: FinishReason = answer.play(steps, min(room, request.max_tokens or room))
        ended = time.perf_counter()
        with self._lock:
            self._prompt_tokens += prompt_tokens
            self._tokens_generated += answer.tokens
        return Result(
            text=answer.text,
            reasoning=answer.reasoning or None,
            finish_reason=reason,
            usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=answer.tokens),
            timings=Timings(
                queue_seconds=began - job.submitted,
                prompt_seconds=prompt_done - began,
                generation_seconds=ended - prompt_done,
                first_token_seconds=answer.first_token_seconds,
                prompt_tokens=prompt_tokens,
                generated_tokens=answer.tokens,
            ),
            logprobs=tuple(answer.logprobs) if request.logprobs is not None else None,
            model=self._info.model,
            prompt=prompt,
            params=_params(request),
            messages=request.messages,
        )


class _Answer:
    """The text of one request as it grows."""

    def __init__(self, job: _Job, request: CompletionRequest) -> None:
        self.text = self.reasoning = ""
        self.tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.first_token_seconds: float | None = None
        self._job = job
        self._request = request
        self._sent = 0

    def play(self, steps: Iterable[Any], limit: int) -> FinishReason:
        stop = self._job.stop
        reason: FinishReason = "stop"
        for step in steps:
            if stop.is_set():
                break
            if not isinstance(step, str | Delta):
                self._pause(step)
            elif self.tokens >= limit:
                reason = "length"
                break
            elif self._add(step if isinstance(step, Delta) else Delta(step)):
                break
        self._send(Delta("", 0), len(self.text))
        return "interrupted" if stop.is_set() else reason

    def _pause(self, step: object) -> None:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, threading.Event):
            while not step.wait(0.002) and not self._job.stop.is_set():
                pass
        elif isinstance(step, int | float):
            self._job.stop.wait(None if math.isinf(step) else step)
        else:
            raise TypeError(f"a script has no step like {step!r}")

    def _add(self, token: Delta) -> bool:
        """Append a token; return whether a stop string ended the answer."""
        self.tokens += 1
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._job.submitted
        if token.reasoning:
            self.reasoning += token.text
            self._job.stream.put(token)
            return False
        self.text += token.text
        if self._request.logprobs is not None:
            top = tuple((f"{token.text}{k or ''}", -0.1 - k) for k in range(self._request.logprobs))
            self.logprobs.append(TokenLogprob(token.text, -0.1, top))
        stops = self._request.stop
        cut = min((at for stop in stops if (at := self.text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.text = self.text[:cut]
        else:
            self._send(token, len(self.text) - _held_back(self.text, stops))
        return cut >= 0

    def _send(self, token: Delta, end: int) -> None:
        if end > self._sent:
            self._job.stream.put(replace(token, text=self.text[self._sent : end]))
            self._sent = end


def _held_back(text: str, stops: tuple[str, ...]) -> int:
    """Return how many characters at the end of ``text`` may be the start of a stop string."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest


def _params(request: CompletionRequest) -> dict[str, object]:
    seed = request.sampling.seed
    return {
        "temperature": request.sampling.temperature,
        "seed": 0 if seed is None else seed,
        "max_tokens": request.max_tokens,
    }


def _interrupted(request: Asked, info: EngineInfo) -> AnyResult:
    """Return the result of a request that was cancelled before it ran."""
    if isinstance(request, EmbeddingRequest | RerankRequest):
        return nothing(request, info, "interrupted")
    if isinstance(request, ScoreRequest):
        return ScoreResult(logprobs=np.zeros(0), model=info.model)
    return Result(
        text="",
        finish_reason="interrupted",
        model=info.model,
        params=_params(request),
        messages=request.messages,
    )
