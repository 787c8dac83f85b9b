"""vLLM behind its own server: the engines of this package, with another process doing the work.

Prompts, constraints, thoughts and tool calls are handled as in the kernel, by the same code; the server gets
token ids and gives back tokens, so that the answers are the same. Only what it alone can read, images and the
formats of its named parsers, goes through its own chat endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nbinfer.contract.errors import (
    EngineClosed,
    EngineError,
    ModelLoadError,
    NbinferError,
    NotSupported,
    RequestError,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest
from nbinfer.engines.images import has_images
from nbinfer.engines.protocol import EngineInfo
from nbinfer.engines.remote.clients import ConnectionLostError, Endpoint, OwnClient
from nbinfer.engines.remote.engine import RemoteEngine
from nbinfer.engines.remote.wire import vectors_from_wire
from nbinfer.engines.text import THINK_CLOSE
from nbinfer.engines.vllm.answers import Answer, Node
from nbinfer.engines.vllm.arguments import ALWAYS
from nbinfer.engines.vllm.generate import CompletionEngine
from nbinfer.engines.vllm.pooled import PooledEngine
from nbinfer.engines.vllm.sampling import Constraints, sampling_words
from nbinfer.engines.vllm.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from nbinfer.contract.requests import Request
    from nbinfer.engines.stream import Stream
    from nbinfer.engines.vllm.answers import Job
    from nbinfer.engines.vllm.arguments import VllmArguments
    from nbinfer.engines.vllm.build import Device
    from nbinfer.gguf.safetensors import SafetensorsHeader

AT_ONCE = 256
"""Sequences sent at once where nothing else was asked: what vLLM itself runs on most GPUs."""
_PROBE = "  Hello, wörld!\n\tif x == 10_000: 世界 🙂 <s>"
_TOKEN = "token_id:"  # noqa: S105 - how vLLM writes a token that is asked for by its number


class Server(Protocol):
    """The server behind an engine."""

    @property
    def name(self) -> str:
        """What the model is called there."""
        ...

    @property
    def socket(self) -> str:
        """Where it listens."""
        ...

    @property
    def reports(self) -> Mapping[str, str]:
        """What it said about itself while it started."""
        ...

    def wait_ready(self) -> None:
        """Wait until it listens; raises what ended it."""
        ...

    def note_ready(self) -> None:
        """Call when it has answered."""
        ...

    def problem(self, seconds: float) -> NbinferError | None:
        """Return what ended it by itself, within ``seconds``; None: it runs, or was stopped."""
        ...

    def stop(self) -> None:
        """End it; returns when all of it is gone."""
        ...


class Host:
    """Holds a server, and runs an engine's loop in a thread: the part that the kernel's ``Host`` has there.

    Parameters
    ----------
    server
        Started, maybe not ready.
    prepare
        Called when the server listens; raises when it cannot answer.
    serve
        Called in the thread; returns when the engine closes.
    stopped
        Called when nothing runs any more, with the error for whoever still waits.
    """

    forked = False

    def __init__(
        self,
        server: Server,
        *,
        prepare: Callable[[], None],
        serve: Callable[[], None],
        stopped: Callable[[NbinferError], None],
    ) -> None:
        self.name = server.name
        self.closing = False
        self.wake = threading.Condition()
        self._server, self._prepare, self._serve, self._stopped = server, prepare, serve, stopped
        self._thread = threading.Thread(target=self._run, name=f"nbinfer-{self.name}", daemon=True)
        self.loop = asyncio.new_event_loop()

    def start(self) -> None:
        """Wait for the server, ask it once, and begin to serve."""
        threading.Thread(target=self.loop.run_forever, name="nbinfer-vllm-http", daemon=True).start()
        try:
            self._server.wait_ready()
            self._prepare()
            self._server.note_ready()
        except BaseException:
            self._server.stop()
            self.loop.call_soon_threadsafe(self.loop.stop)
            raise
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Wait for a request to the server.

        Raises
        ------
        NbinferError
            What the server answers, or what ended it.
        """
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop).result()
        except ConnectionLostError as error:
            raise self.lost(error) from None

    def lost(self, error: Exception) -> NbinferError:
        """Return why the server does not answer any more."""
        problem = self._server.problem(0.0 if self.closing else 3.0)
        if problem is not None:
            return problem
        if self.closing:
            return EngineClosed(f"{self.name} was unloaded while the request ran.")
        return EngineError(f"vLLM's server does not answer: {error!s:.200}")

    def check_open(self) -> None:
        """Refuse use after the end.

        Raises
        ------
        EngineClosed
            The model was unloaded.
        """
        if self.closing:
            raise EngineClosed(f"{self.name} was unloaded; load it again with nb.load.")

    def close(self) -> None:
        """End the thread and the server; idempotent."""
        with self.wake:
            self.closing = True
            self.wake.notify_all()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        closed: NbinferError = EngineClosed(f"{self.name} was unloaded while the request ran.")
        try:
            self._serve()
        except Exception as error:  # noqa: BLE001 - whatever happened, nobody may be left waiting
            closed = EngineError(f"vLLM stopped: {error!r:.300}")
        finally:
            self.closing = True
            # Its owner also closes what was lost.
            self._stopped(self._server.problem(0.0) or closed)
            self._server.stop()
            self.loop.call_soon_threadsafe(self.loop.stop)


class _Folder:
    """What the files of a model say: its tokenizer, and what ends an answer."""

    def __init__(self, path: Path, header: SafetensorsHeader) -> None:
        # Not AutoTokenizer: that imports torch, which takes seconds and 300 MB; see `agree`.
        from transformers import PreTrainedTokenizerFast

        self._path = path
        self.tokenizer = self._read(PreTrainedTokenizerFast)
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            raise NotSupported(
                f"{path.name} has no tokenizer.json, which nbinfer needs to write its prompts.\n"
                "Use a GGUF file of the model, or run `vllm serve` yourself and use backend='openai'."
            )
        self.size = header.n_vocab
        self.trained = header.context_length
        ends = _json(path / "generation_config.json").get("eos_token_id", header.get("eos_token_id"))
        self.ends = [ends] if isinstance(ends, int) else [e for e in ends or () if isinstance(e, int)]

    def _read(self, kind: Any) -> Any:
        try:
            return kind.from_pretrained(str(self._path), trust_remote_code=False)
        except Exception as e:
            raise ModelLoadError(f"{self._path.name}: its tokenizer cannot be read: {e!s:.200}") from e

    def agree(self, counted: Callable[[str], list[int]]) -> None:
        """Read texts as the server does: a few models have a tokenizer of a class of its own.

        ``counted`` returns the server's tokens of a text.
        """
        if self.tokenizer.encode(_PROBE) != counted(_PROBE):
            from transformers import AutoTokenizer

            self.tokenizer = self._read(AutoTokenizer)


def _tokens(host: Any, client: OwnClient, text: str) -> list[int]:
    """Return the server's tokens of a text."""
    found = host.call(client.post("/tokenize", {"prompt": text, "add_special_tokens": True}))
    return [int(token) for token in found["tokens"]]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _info(
    server: Server, given: VllmArguments, folder: _Folder, *, mode: Mode, parallel: int, **more: Any
) -> EngineInfo:
    engine, reports = given.engine, server.reports
    effective = {
        "dtype": reports.get("dtype", engine["dtype"]),
        "kv_type": engine["kv_cache_dtype"],
        "kv_tokens": int(reports.get("kv_cache_tokens", 0)),
        "gpus": engine.get("tensor_parallel_size", 1),
        "quantization": engine.get("quantization"),
    }
    if "weights_gib" in reports:
        effective["weights_gib"] = float(reports["weights_gib"])
    return EngineInfo(
        backend="vllm",
        model=server.name,
        mode=mode,
        context_size=engine["max_model_len"],
        trained_context_size=folder.trained,
        parallel=parallel,
        effective=effective,
        **more,
    )


# -- completions ----------------------------------------------------------------------------------------


class ServedCompletions(CompletionEngine):
    """Completions of one model behind vLLM's server.

    Parameters
    ----------
    given
        What the server was started with.
    server
        The server.
    path, header
        The model's folder, and what its files say.
    device
        What the installed vLLM was built for.
    """

    def __init__(
        self,
        given: VllmArguments,
        server: Server,
        *,
        path: Path,
        header: SafetensorsHeader,
        device: Device,
        digest: str = "",
        version: str = "",
        exact: bool = False,
    ) -> None:
        self._server, self._path, self._header = server, path, header
        self._arrived: deque[tuple[str, Any]] = deque()
        self._tasks: dict[str, asyncio.Future[None]] = {}
        self._chat: RemoteEngine | None = None
        super().__init__(
            given, {}, name=server.name, device=device, threads=0, digest=digest, version=version, exact=exact
        )

    def _make_host(self, settings: Mapping[str, Any], variables: Mapping[str, str], threads: int) -> Any:
        del settings, variables, threads
        # The files are read while the server starts.
        self._folder = _Folder(self._path, self._header)
        self._client = OwnClient(self._server.socket)
        return Host(self._server, prepare=self._prepare_served, serve=self._serve, stopped=self._fail_all)

    def _prepare_served(self) -> None:
        """Generate one token: some models fail only then, and the server calls itself healthy before."""
        given, folder, name = self._given, self._folder, self._name
        folder.agree(lambda text: _tokens(self._host, self._client, text))
        self._vocabulary = Vocabulary(
            folder.tokenizer, name=name, size=folder.size, ends=folder.ends, chat_template=given.chat_template
        )
        self._constraints = Constraints(folder.tokenizer, folder.size)
        self._takes_images = True  # the server knows, and says so
        asked = given.engine.get("max_num_seqs", AT_ONCE)
        self._seats = 1 if self._exact else asked
        self._adapters = dict(given.adapters)
        self.info = _info(
            self._server,
            given,
            folder,
            mode=Mode.COMPLETION,
            parallel=self._seats,
            digest=self._digest,
            version=self._version,
        )
        body = {"model": name, "prompt": [0], "max_tokens": 1, "temperature": 0.0, "logprobs": 1}
        self._host.call(self._client.post("/v1/completions", body))  # type: ignore[attr-defined]
        if given.tool_call_parser or given.reasoning_parser or "vision_config" in self._header.config:
            endpoint = Endpoint(
                base_url="http://localhost/v1", model=self._called(None), socket=self._server.socket
            )
            self._chat = RemoteEngine(endpoint, self.info)

    def _called(self, adapter: str | None) -> str:
        """What a request calls the model, or one of its adapters."""
        return adapter or (ALWAYS if ALWAYS in self._given.adapters else self._name)

    # -- callers' side ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Start a request; returns at once. See :meth:`nbinfer.engines.protocol.Engine.submit`."""
        if isinstance(request, CompletionRequest) and request.messages is not None:
            named = self._given.tool_call_parser or self._given.reasoning_parser
            # What is constrained has no thoughts or calls to be told apart.
            if has_images(request) or (named and request.constraint is None):
                return self._through_chat(request)
        return super().submit(request)

    def _through_chat(self, request: CompletionRequest) -> Stream:
        """Send a conversation through vLLM's own chat endpoint."""
        self._host.check_open()
        if self._chat is None:
            raise NotSupported(f"{self._name} takes no images: load a vision model.")
        if request.adapter is not None:
            raise NotSupported(f"{self._name}: images and named parsers go without adapter=.")
        return self._chat.submit(replace(request, reasoning_budget=None))

    # -- the engine's thread ----------------------------------------------------------------------------

    def _busy(self) -> bool:
        """Whether there is something to do now; the server does the rest."""
        seats = self._seats + (not self._exact)
        free = len(self._running)
        return bool(self._arrived or (self._cells and free < seats) or (self._rows and free < self._seats))

    def _add(self, job: Job) -> None:
        key = str(next(self._numbers))
        if job.started is None:
            job.started = time.perf_counter()
        self._running[key] = job
        work = self._write(key, job) if isinstance(job, Answer) else self._score(key, job)
        self._tasks[key] = asyncio.run_coroutine_threadsafe(work, self._host.loop)  # type: ignore[attr-defined, assignment]

    def _abort(self, key: str) -> None:
        del self._running[key]
        task = self._tasks.pop(key, None)
        if task is not None:
            # The connection closes with it, and the server stops computing.
            task.cancel()

    def _step(self) -> None:
        while self._arrived:
            key, output = self._arrived.popleft()
            job = self._running.get(key)
            if job is None:
                continue
            if isinstance(output, NbinferError):
                job.stream.fail(output)
                self._leave(key, job)
                continue
            if isinstance(job, Answer):
                job.cached = output.num_cached_tokens or job.cached
                self._cut_at_stop(job, output.outputs[0])
            outcome = job.take(output)
            self._computed += outcome.prompt_tokens
            self._generated += outcome.generated
            if outcome.again:
                self._abort(key)
                self._add(job)
            elif outcome.done or output.finished:
                self._leave(key, job)

    def _cut_at_stop(self, job: Answer, new: Any) -> None:
        """Drop the tokens after a stop string: a busy server sends several at once, the kernel has one."""
        if not job.request.stop or len(new.token_ids) < 2:  # noqa: PLR2004 - a single one cannot be cut
            return
        thinking = job.assembler.in_reasoning
        for count in range(1, len(new.token_ids)):
            text = self._vocabulary.text([*job.generated, *new.token_ids[:count]])
            if thinking and THINK_CLOSE not in text:
                continue  # thoughts end at nothing but their own end
            if any(stop in text.rpartition(THINK_CLOSE)[2] for stop in job.request.stop):
                del new.token_ids[count:], new.logprobs[count:]
                return

    def _leave(self, key: str, job: Job) -> None:
        self._abort(key)
        self._unfinished.discard(job)

    def _fail_all(self, error: NbinferError) -> None:
        """End every request that has no end yet."""
        super()._fail_all(error)
        if self._chat is not None:
            self._chat.close()

    # -- the loop's side --------------------------------------------------------------------------------

    def _put(self, key: str, output: Any) -> None:
        self._arrived.append((key, output))
        with self._host.wake:
            self._host.wake.notify()

    async def _write(self, key: str, job: Answer) -> None:
        """Have an answer written, piece by piece."""
        words = sampling_words(job.request, seed=job.seed, limit=job.limit - len(job.generated))
        body = {
            **{name: value for name, value in words.items() if value is not None},
            "model": self._called(job.adapter),
            "prompt": [*job.tokens, *job.generated],
            "add_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "priority": 0 if job.interactive else 1,
        }
        last: SimpleNamespace | None = None
        try:
            async with contextlib.aclosing(self._client.stream("/v1/completions", body)) as chunks:
                async for chunk in chunks:
                    for choice in chunk.get("choices") or ():
                        piece = _output(choice)
                        if not piece.finished:
                            self._put(key, piece)
                        # The counts come after the last piece, and belong to it.
                        last = piece if piece.finished else last
                    if chunk.get("usage") and last is not None:
                        details = chunk["usage"].get("prompt_tokens_details") or {}
                        last.num_cached_tokens = details.get("cached_tokens") or 0
            if last is None:
                raise ConnectionLostError("the answer ended in the middle")  # noqa: TRY301 - one way to end
            self._put(key, last)
        except Exception as error:  # noqa: BLE001 - an answer of another shape must end its request too
            self._put(key, await self._refusal(error))

    async def _score(self, key: str, job: Any) -> None:
        """Ask how likely each of some tokens is to come next."""
        node: Node = job
        body = {
            "model": self._called(node.adapter),
            "prompt": node.prompt()["prompt_token_ids"],
            "add_special_tokens": False,
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 0,
            "logprob_token_ids": node.follow,
            "return_tokens_as_token_ids": True,
            "priority": 0 if node.interactive else 1,
        }
        try:
            found = await self._client.post("/v1/completions", body)
            (top,) = found["choices"][0]["logprobs"]["top_logprobs"]
            logprobs = {
                int(token.removeprefix(_TOKEN)): SimpleNamespace(logprob=value)
                for token, value in top.items()
            }
            details = (found.get("usage") or {}).get("prompt_tokens_details") or {}
            whole = SimpleNamespace(logprobs=[logprobs])
            cached = details.get("cached_tokens") or 0
            self._put(key, SimpleNamespace(outputs=[whole], finished=True, num_cached_tokens=cached))
        except Exception as error:  # noqa: BLE001 - as above
            self._put(key, await self._refusal(error))

    async def _refusal(self, error: Exception) -> NbinferError:
        host: Any = self._host
        # The server still answers for a moment after the process that computes has died.
        if isinstance(error, ConnectionLostError) or "EngineCore encountered" in str(error):
            lost: NbinferError = await asyncio.to_thread(host.lost, error)
            return lost
        if isinstance(error, RequestError):
            return RequestError(f"vLLM refuses this request: {str(error).splitlines()[0]:.300}")
        if isinstance(error, NbinferError):
            return error
        return EngineError(f"vLLM's server gave an answer that cannot be read: {error!r:.200}")


def _output(choice: Mapping[str, Any]) -> SimpleNamespace:
    """Return a piece of an answer as vLLM gives it in the kernel."""
    tokens = list(choice.get("token_ids") or ())
    reason = choice.get("finish_reason")
    new = SimpleNamespace(
        token_ids=tokens,
        text=choice.get("text") or "",
        finish_reason=reason,
        logprobs=_logprobs(tokens, choice.get("logprobs")),
    )
    return SimpleNamespace(
        outputs=[new], finished=reason is not None, prompt_token_ids=None, num_cached_tokens=0
    )


def _logprobs(tokens: Sequence[int], found: Mapping[str, Any] | None) -> list[dict[int, Any]]:
    """Return log-probabilities by token, as vLLM gives them in the kernel; only the written ones have ids."""
    if not found:
        return []
    out = []
    columns = zip(tokens, found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    for token, text, chosen, top in columns:
        others = sorted((top or {}).items(), key=lambda pair: -pair[1])
        entries: dict[int, Any] = {}
        for rank, (word, value) in enumerate(others, 1):
            own = word == text and math.isclose(value, chosen)
            entries[token if own else -rank] = SimpleNamespace(logprob=value, rank=rank, decoded_token=word)
        if token not in entries:
            entries[token] = SimpleNamespace(logprob=chosen, rank=len(others) + 1, decoded_token=text)
        out.append(entries)
    return out


# -- vectors and scores ---------------------------------------------------------------------------------


class ServedPooling(PooledEngine):
    """Embeddings or relevance scores of one model behind vLLM's server; parameters as above."""

    def __init__(
        self,
        given: VllmArguments,
        server: Server,
        *,
        mode: Mode,
        path: Path,
        header: SafetensorsHeader,
        digest: str = "",
        version: str = "",
    ) -> None:
        self._server, self._path, self._header, self._given = server, path, header, given
        super().__init__(given, {}, mode=mode, name=server.name, threads=0, digest=digest, version=version)

    def _make_host(self, given: VllmArguments, variables: Mapping[str, str], threads: int) -> Any:
        del given, variables, threads
        self._folder = _Folder(self._path, self._header)
        self._client = OwnClient(self._server.socket)
        return Host(self._server, prepare=self._prepare_served, serve=self._serve, stopped=self._fail_all)

    def _prepare_served(self) -> None:
        """Run it once: some models fail only then, and the server calls itself healthy before."""
        folder, given = self._folder, self._given
        folder.agree(lambda text: _tokens(self._host, self._client, text))
        self._vocabulary = Vocabulary(folder.tokenizer, name=self._name, size=folder.size)
        found = self._vectors([[0]]) if self._mode is Mode.EMBEDDING else self._scores("a", ["b"])
        self.info = _info(
            self._server,
            given,
            folder,
            mode=self._mode,
            parallel=given.engine.get("max_num_seqs", AT_ONCE),
            dimensions=found.shape[-1] if self._mode is Mode.EMBEDDING else None,
            digest=self._digest,
            version=self._version,
        )

    def _computed(self, texts: list[list[int]]) -> NDArray[np.float32]:
        """Vectors of texts that have tokens, as the model gives them; shape (texts, dimensions)."""
        found = self._post("/v1/embeddings", input=texts, encoding_format="base64", use_activation=False)
        data = sorted(found["data"], key=lambda each: each["index"])
        return vectors_from_wire(each["embedding"] for each in data)

    def _scores(self, query: str, documents: list[str]) -> Any:
        """Scores of documents, float32 of shape (documents,)."""
        found = self._post("/score", text_1=query, text_2=documents)
        scores = np.zeros(len(documents), np.float32)
        for each in found["data"]:
            scores[each["index"]] = each["score"]
        return scores

    def _post(self, path: str, **body: Any) -> Any:
        host: Any = self._host
        name = ALWAYS if ALWAYS in self._given.adapters else self._name
        return host.call(self._client.post(path, {"model": name, **body}))
