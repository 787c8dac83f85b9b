"""Text generation: a loop that decodes many sequences at once.

One thread owns the llama.cpp context. Each step it takes one token for every sequence that is generating and
fills the rest of the batch with pieces of waiting prompts, runs one decode, and samples. Callers only put
requests in and read streams. ``schedule`` decides who takes part in a step, and who waits; ``prompts`` makes
of a request what is decoded.

Prompts share what they have in common (see ``prefixes``): rows that arrive together wait for the first of
them to compute the prefix they share.

The text does not depend on any of this, but for one thing: a computer adds floating-point numbers in another
order when a batch has another shape, which can tip the balance between two tokens that are almost equally
likely. ``exact=True`` serves one request at a time, from its first token, in batches of fixed shape.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import (
    EngineClosed,
    EngineError,
    NbinferError,
    NotSupported,
    RequestError,
)
from nbinfer.contract.modes import Mode
from nbinfer.contract.results import (
    Delta,
    Finished,
    PromptProgress,
    ScoreResult,
)
from nbinfer.engines.alive import closed_on_error, register
from nbinfer.engines.images import has_images
from nbinfer.engines.llamacpp.adapters import Adapters
from nbinfer.engines.llamacpp.constrain import Constrainer
from nbinfer.engines.llamacpp.context import ABORTED, NO_SPACE, OK, Context, engine_version
from nbinfer.engines.llamacpp.prefixes import Prefixes
from nbinfer.engines.llamacpp.prompts import Prompts
from nbinfer.engines.llamacpp.sampling import Sampler, logprob_of
from nbinfer.engines.llamacpp.schedule import Schedule
from nbinfer.engines.llamacpp.sequence import Scores, Sequence, Slot
from nbinfer.engines.prompts import check_length
from nbinfer.engines.protocol import EngineInfo, EngineLoad
from nbinfer.engines.stream import Stream
from nbinfer.engines.text import THINK_OPEN, TextAssembler
from nbinfer.engines.writing import cut_short, result_of
from nbinfer.memory import defaults

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nbinfer.contract.requests import CompletionRequest, Request, ScoreRequest
    from nbinfer.contract.results import FinishReason, Result
    from nbinfer.engines.llamacpp.context import ContextSettings
    from nbinfer.engines.llamacpp.media import Media, Projector
    from nbinfer.engines.llamacpp.saved import SavedStates
    from nbinfer.engines.llamacpp.speculate import Speculation
    from nbinfer.engines.llamacpp.weights import Weights

FAILED = -1
STEP_SECONDS = 0.5
"""A batch with pieces of prompts is sized to take about this long, so that cells stay responsive."""
SLOW_SECONDS = 3.0
MIN_CHUNK = 16
TILE = 64
"""llama.cpp's flash attention on a CPU takes so many tokens as one tile; half a tile takes as long.

Where a tile takes longer than ``SLOW_SECONDS``, pieces are smaller all the same."""


class CompletionEngine:
    """Serves completions of one model. See the module's description."""

    def __init__(
        self,
        weights: Weights,
        settings: ContextSettings,
        *,
        name: str,
        digest: str = "",
        reasoning_budget: int | None = None,
        exact: bool = False,
        speculation: Speculation | None = None,
        adapters: Adapters | None = None,
        projector: Projector | None = None,
        saved: SavedStates | None = None,
    ) -> None:
        self._weights = weights
        self._prompts = Prompts(weights, name=name, reasoning_budget=reasoning_budget)
        # A recurrent state is paid for per sequence; elsewhere a sequence costs one row of logits.
        usual = 1 if weights.has_recurrent_state else defaults.PARALLEL
        parallel = 1 if exact else settings.parallel or usual
        self._speculation = speculation
        self._projector = projector
        self._adapters = adapters or Adapters(weights, {})
        extra = speculation.num_tokens if speculation else 0
        self._context = Context(weights, settings, parallel=parallel, extra_outputs=extra)
        with closed_on_error(self._context):
            self._check_kind(name)
            self._prepare(name, digest, parallel)
        self._prefixes = Prefixes(self._context, weights, self._slots, shares=not exact, saved=saved)
        self._schedule = Schedule(self._context, self._slots, self._prefixes, self._adapters)
        self._constrainer = Constrainer(weights)
        self._thread = threading.Thread(target=self._run, name=f"nbinfer-{name}", daemon=True)
        self._thread.start()
        register(self)

    def _check_kind(self, name: str) -> None:
        if self._context.memory is None or self._weights.reads_with_an_encoder:
            kind = "an encoder" if self._context.memory is None else "an encoder with a decoder"
            raise NotSupported(
                f"{name} is {kind}: it cannot continue text here. "
                "An embedding or reranking model is loaded with that mode.",
            )

    def _prepare(self, name: str, digest: str, parallel: int) -> None:
        self._name = name
        weights = self._weights
        self.info = EngineInfo(
            backend="llamacpp",
            model=name,
            mode=Mode.COMPLETION,
            context_size=self._context.size,
            trained_context_size=weights.trained_context_size,
            parallel=parallel,
            digest=digest,
            version=engine_version(),
            effective=self._context.effective(),
        )
        self._slots = [Slot(i) for i in range(parallel)]
        self._wake = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._unfinished: set[Sequence] = set()
        self._cancelled: set[Stream] = set()
        self._in_flight: frozenset[Stream] = frozenset()
        self._closing = self._forked = False
        self._prompt_rate = 0.0
        self._prompt_tokens = 0
        self._generated_tokens = 0

    @property
    def context_pointer(self) -> Any:
        """llama.cpp's own context, for its memory breakdown."""
        return self._context.pointer

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._weights.end_tokens

    # -- callers' side ----------------------------------------------------------------------------------

    def render(self, request: CompletionRequest) -> tuple[str, int]:
        """Return the exact prompt and its length in tokens; runs nothing."""
        with self._weights.in_use():
            if has_images(request) and self._projector is not None:
                text, media = self._prompts.with_images(request, self._projector)
                return text, media.n_tokens
            text, tokens = self._prompts.of(request)
        return text, len(tokens)

    def submit(self, request: Request) -> Stream:
        """Start a completion or a scoring. See :meth:`nbinfer.engines.protocol.Engine.submit`."""
        from nbinfer.contract.requests import CompletionRequest, ScoreRequest

        if isinstance(request, ScoreRequest):
            with self._weights.in_use():
                return self._start_scoring(request)
        if not isinstance(request, CompletionRequest):
            raise NotSupported(
                f"{self._name} is loaded for completion: load it with another mode for that.",
            )
        if request.n != 1:
            raise NotSupported("one request gives one answer here: submit it n times with different seeds.")
        if has_images(request) and self._projector is None:
            raise NotSupported(
                f"{self._name} has no image encoder: load a vision model, with its mmproj file beside it.",
            )
        with self._weights.in_use():
            return self._start(request)

    def _start(self, request: CompletionRequest) -> Stream:
        media: Media | None = None
        if has_images(request):
            assert self._projector is not None  # noqa: S101 - submit has checked
            text, media = self._prompts.with_images(request, self._projector)
            tokens = media.placeholders
            check_length(media.n_tokens, self.info)
        else:
            text, tokens = self._prompts.of(request)
        check_length(len(tokens), self.info)
        room = self.info.context_size - len(tokens)
        adapter = self._adapters.choose(request.adapter)
        seed = secrets.randbits(32) if request.sampling.seed is None else request.sampling.seed
        matcher = self._constrainer.matcher(request.constraint) if request.constraint else None
        opened = request.messages is not None and text.rstrip().endswith(THINK_OPEN)
        if opened and self._prompts.budget(request) == 0:
            tokens, opened = np.concatenate([tokens, self._prompts.thought_end]), False
        sequence = Sequence(
            request=request,
            stream=Stream(),
            prompt=tokens,
            prompt_text=text,
            sampler=Sampler(request.sampling, seed=seed, n_vocab=self._weights.n_vocab, matcher=matcher),
            assembler=TextAssembler(
                request.stop,
                reasoning=request.messages is not None and matcher is None,
                inside_reasoning=opened and matcher is None,
            ),
            seed=seed,
            limit=min(room, request.max_tokens or room),
            media=media,
            adapter=adapter,
            submitted=time.perf_counter(),
        )
        return self._enqueue([sequence])

    def _start_scoring(self, request: ScoreRequest) -> Stream:
        question = request.question()
        if has_images(question):
            raise NotSupported("answers are scored behind text only, not behind images.")
        text, tokens = self._prompts.of(question)
        answers = [
            self._weights.tokenize(a, special=False, add_special=False).tolist() for a in request.answers
        ]
        check_length(len(tokens) + max(len(a) for a in answers), self.info)
        scores = Scores(np.zeros(len(answers)), len(answers))
        sampler = Sampler(question.sampling, seed=0, n_vocab=self._weights.n_vocab)
        now = time.perf_counter()
        return self._enqueue(
            [
                Sequence(
                    request=question,
                    stream=Stream(),
                    prompt=tokens,
                    prompt_text=text,
                    sampler=sampler,
                    assembler=TextAssembler(),
                    seed=0,
                    limit=len(answer),
                    adapter=self._adapters.choose(None),
                    submitted=now,
                    scores=scores,
                    script=answer,
                    answer_index=i,
                )
                for i, answer in enumerate(answers)
            ],
        )

    def _enqueue(self, sequences: list[Sequence]) -> Stream:
        stream = Stream(on_cancel=lambda: self._cancel(stream))
        with self._wake:
            if self._closing:
                for sequence in sequences:
                    sequence.sampler.close()
                raise EngineClosed(f"{self._name} was unloaded; load it again with nb.load.")
            for sequence in sequences:
                sequence.stream = stream
                self._inbox.append(sequence)
                self._unfinished.add(sequence)
            self._wake.notify()
        return stream

    def tokenize(self, text: str, *, add_special: bool = True, special: bool = True) -> list[int]:
        """Token ids of a text; ``special`` reads control tokens written out in it."""
        with self._weights.in_use():
            tokens = self._weights.tokenize(text, special=special, add_special=add_special)
        return [int(token) for token in tokens]

    def detokenize(self, tokens: list[int]) -> str:
        """The text of tokens, control tokens written out.

        Raises
        ------
        RequestError
            A token is not in the vocabulary.
        """
        size = self._weights.n_vocab
        for token in tokens:
            if not 0 <= token < size:
                raise RequestError(f"token {token} is not in the vocabulary of {size:,}.")
        with self._weights.in_use():
            return self._weights.text(tokens)

    def load(self) -> EngineLoad:
        """Return what is running now."""
        running = [s.sequence for s in self._slots if s.sequence is not None]
        return EngineLoad(
            running=len(running),
            waiting=len(self._schedule.waiting) + len(self._inbox),
            context_used=sum(s.position for s in running),
            tokens_generated=self._generated_tokens,
            prompt_tokens=self._prompt_tokens,
        )

    def close(self) -> None:
        """End what runs with ``EngineClosed`` and free the memory; idempotent."""
        if self._forked:
            return
        with self._wake:
            self._closing = True
            self._context.request_abort()
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """Refuse all use: this is a forked child, where the engine's thread does not exist."""
        self._forked = True
        self._weights.abandon()

    def _cancel(self, stream: Stream) -> None:
        with self._wake:
            self._cancelled.add(stream)
            # A decode that serves nobody else is not worth finishing.
            if self._in_flight == {stream}:
                self._context.request_abort()
            self._wake.notify()

    # -- the engine's thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._inbox or self._cancelled or self._closing or self._schedule.busy):
                        self._wake.wait()
                    if self._closing:
                        break
                    self._schedule.waiting.extend(self._inbox)
                    self._inbox.clear()
                    cancelled, self._cancelled = self._cancelled, set()
                    self._context.reset_abort()
                self._drop_cancelled(cancelled)
                self._schedule.admit()
                self._advance()
            self._prefixes.save()
        except BaseException as e:  # noqa: BLE001 - whatever happened, nobody may be left waiting
            self._fail_all(e if isinstance(e, NbinferError) else EngineError(f"the engine stopped: {e!r}"))
        finally:
            self._fail_all(EngineClosed(f"{self._name} was unloaded while the request ran."))
            for part in (self._speculation, self._projector):
                if part is not None:
                    part.close()
            self._context.close()
            self._weights.close()

    def _fail_all(self, error: NbinferError) -> None:
        """End every request that has no end yet, wherever it was when the engine stopped."""
        with self._wake:
            self._closing = True
            everyone, self._unfinished = self._unfinished, set()
            self._schedule.waiting.clear()
            self._inbox.clear()
            for slot in self._slots:
                slot.sequence = None
        for sequence in everyone:
            sequence.stream.fail(error)
            sequence.sampler.close()

    def _drop_cancelled(self, cancelled: set[Stream]) -> None:
        if not cancelled:
            return
        for sequence in [s for s in self._schedule.waiting if s.stream in cancelled]:
            self._schedule.waiting.remove(sequence)
            self._finish(sequence, "interrupted")
        for slot in self._slots:
            if slot.sequence is not None and slot.sequence.stream in cancelled:
                self._finish(slot.sequence, "interrupted")

    # -- one step ---------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Decode one batch and hand its outcome to the sequences in it."""
        active = self._schedule.turn()
        if not active:
            return
        unfed = next((s for s in active if s.media is not None and s.position == 0), None)
        if unfed is not None:
            self._feed(unfed)
            return
        began = time.perf_counter()
        planned = list(self._plan(active))
        with self._wake:
            if self._cancelled or self._closing:
                self._context.clear_batch()
                return
            self._in_flight = frozenset(sequence.stream for sequence, _, _ in planned)
        code = self._decode(planned)
        if code == ABORTED:
            # Only a batch of cancelled requests, or a closing engine, is aborted; part of it may be stored.
            for sequence, _, _ in planned:
                self._prefixes.take_back(self._slots[sequence.slot], sequence)
        elif code == NO_SPACE:
            if not self._schedule.make_room():
                for sequence, _, _ in planned:
                    self._finish(sequence, "length")
        elif code == OK:
            self._take_outcome(planned, began)

    def _decode(self, planned: list[tuple[Sequence, int, int]]) -> int:
        """Run the batch; when it fails, those in it fail and nobody else."""
        try:
            return self._context.decode()
        except EngineError as e:
            for sequence, _, _ in planned:
                self._finish(sequence, "error", e)
            return FAILED
        finally:
            self._in_flight = frozenset()

    def _feed(self, sequence: Sequence) -> None:
        """Put a prompt with images into the context, by itself: mtmd does all its decoding."""
        assert sequence.media is not None  # noqa: S101 - the caller chose it for that
        assert self._projector is not None  # noqa: S101 - submit has checked
        if not self._projector.feed(
            self._context.pointer, sequence.media, sequence.slot, self._context.n_batch
        ):
            self._context.drop(sequence.slot)
            if self._prefixes.make_room():
                return
            others = any(s.sequence not in (None, sequence) for s in self._slots)
            if others and not sequence.alone:
                # Tried again when it has the whole context.
                sequence.alone = True
                self._schedule.preempt(self._slots[sequence.slot])
            else:
                self._finish(sequence, "error", EngineError("the images could not be read into the context."))
            return
        self._prompt_tokens += sequence.media.n_tokens
        self._after_decode(sequence, len(sequence.prompt), -1, time.perf_counter())

    def _take_outcome(self, planned: list[tuple[Sequence, int, int]], began: float) -> None:
        now = time.perf_counter()
        self._note_prompt_rate(planned, now - began)
        for sequence, n, index in planned:
            if sequence.guesses:
                self._verify(sequence, index, began)
            else:
                self._after_decode(sequence, n, index, now)
        if self._speculation is not None and len(planned) == 1 and planned[0][1] == 1:
            self._speculation.note_plain(time.perf_counter() - began)

    def _note_prompt_rate(self, planned: list[tuple[Sequence, int, int]], seconds: float) -> None:
        n_prompt = sum(n for sequence, n, _ in planned if not sequence.generating)
        self._prompt_tokens += n_prompt
        n_all = sum(n for _, n, _ in planned)
        rate = n_all / max(seconds, 1e-6)
        # A small batch takes longer per token: it does not show that a large one would be slow.
        if n_prompt and (n_all >= TILE or rate > self._prompt_rate):
            self._prompt_rate = rate

    def _plan(self, active: list[Sequence]) -> Iterator[tuple[Sequence, int, int]]:
        """Fill the batch: yields (sequence, tokens added, batch index of its last token)."""
        context = self._context
        room = context.n_batch
        for sequence in active:
            if sequence.generating:
                sequence.guesses = self._guess(sequence) if len(active) == 1 else []
                tokens = [sequence.generated[-1], *sequence.guesses]
                index = context.add(sequence.slot, tokens, sequence.position, output=True)
                context.mark_outputs(len(tokens))
                yield sequence, len(tokens), index
                room -= len(tokens)
        # Alone, a prompt is cut the same way every time, so that a restarted notebook gives the same text.
        budget = context.n_ubatch
        if self._prompt_rate and not (len(active) == 1 and active[0].interactive):
            rate, whole = self._prompt_rate, int(self._prompt_rate * STEP_SECONDS)
            slow = TILE / rate > SLOW_SECONDS
            whole = max(MIN_CHUNK, whole) if slow else max(TILE, whole - whole % TILE)
            # The tokens above are part of the tile.
            budget = max(MIN_CHUNK, min(budget, whole) - (context.n_batch - room))
        budget = min(room, budget)
        for sequence in sorted(active, key=lambda s: (not s.interactive, s.started)):
            if sequence.generating or budget <= 0:
                continue
            n = min(sequence.length - sequence.position, budget)
            end = sequence.position + n
            piece = sequence.tokens(sequence.position, end)
            last = end == sequence.length
            yield sequence, n, context.add(sequence.slot, piece, sequence.position, output=last)
            budget -= n

    def _guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may come next, for the model to check; only where one sequence runs alone."""
        if self._speculation is None or sequence.scores is not None or sequence.media is not None:
            return []
        room = sequence.limit - len(sequence.generated) - 1
        return self._speculation.propose(sequence.tokens(0, sequence.length), room)

    def _verify(self, sequence: Sequence, index: int, began: float) -> None:
        """Sample where guesses stand; go on as long as they are what the model says itself."""
        guesses, sequence.guesses = sequence.guesses, []
        accepted = 0
        for i in range(len(guesses) + 1):
            before = len(sequence.generated)
            self._after_decode(sequence, 1, index - len(guesses) + i, began)
            kept = sequence.generated[before:]
            if sequence.done or i == len(guesses) or kept != [guesses[i]]:
                break
            accepted += 1
        # What was guessed wrong is in the context's memory: take it out.
        if sequence.slot >= 0:
            self._context.drop(sequence.slot, sequence.position)
        assert self._speculation is not None  # noqa: S101 - it made the guesses
        seconds = time.perf_counter() - began
        self._speculation.note(sequence.tally, drafted=len(guesses), accepted=accepted, seconds=seconds)

    def _after_decode(self, sequence: Sequence, n: int, index: int, now: float) -> None:
        """Take a decode's outcome for one sequence: progress, or a new token."""
        was_prompt = not sequence.generating
        sequence.position += n
        if was_prompt:
            self._prefixes.holds(self._slots[sequence.slot], sequence.tokens(0, sequence.position))
        if was_prompt and not sequence.generated:
            sequence.stream.put(PromptProgress(sequence.position, len(sequence.prompt), sequence.cached))
        if sequence.position < sequence.length:
            return
        if sequence.prompt_done is None:
            sequence.prompt_done = now
        try:
            logits = self._context.logits(index)
            if sequence.scores is not None:
                self._score(sequence, sequence.scores, logits)
                return
            token = sequence.sampler.sample(logits)
            if sequence.request.logprobs is not None:
                sequence.logprobs.append(
                    logprob_of(logits, token, sequence.request.logprobs, self._token_text),
                )
        except NbinferError as e:
            self._finish(sequence, "error", e)
            return
        self._take(sequence, token)

    def _score(self, sequence: Sequence, scores: Scores, logits: NDArray[np.float32]) -> None:
        """Add the log-probability of the script's next token, or of the end after its last."""
        done = len(sequence.generated)
        values = logits.astype(np.float64)
        peak = values.max()
        total = peak + np.log(np.exp(values - peak).sum())
        if done < len(sequence.script):
            token = sequence.script[done]
            scores.logprobs[sequence.answer_index] += values[token] - total
            sequence.generated.append(token)
            return
        ends = values[sorted(self._weights.end_tokens)]
        scores.logprobs[sequence.answer_index] += np.logaddexp.reduce(ends) - total
        self._finish(sequence, "stop")

    def _token_text(self, token: int) -> str:
        return self._weights.render_piece(token, special=True).decode("utf-8", "replace")

    def _take(self, sequence: Sequence, token: int) -> None:
        """Add a sampled token, and whatever the constraint then forces, to the answer."""
        sequence.last_token = time.perf_counter()
        if self._weights.is_end(token):
            if sequence.logprobs:
                sequence.logprobs.pop()
            self._finish(sequence, "stop")
            return
        tokens = [token]
        matcher = sequence.sampler.matcher
        if matcher is not None and sequence.request.logprobs is None:
            for forced in matcher.forced():
                matcher.accept(forced)
                tokens.append(forced)
        for i, new in enumerate(tokens):
            sequence.generated.append(new)
            self._generated_tokens += 1
            piece = sequence.assembler.push(self._weights.piece(new))
            self._emit(sequence, piece.text, piece.reasoning)
            tokens += self._end_of_thought(sequence)
            if piece.stopped:
                self._finish(sequence, "stop")
                return
            if len(sequence.generated) >= sequence.limit:
                sequence.cut_short = i + 1 < len(tokens)
                whole = matcher is not None and not sequence.cut_short and matcher.complete
                self._finish(sequence, "stop" if whole else "length")
                return
        if matcher is not None and matcher.complete:
            self._finish(sequence, "stop")

    def _end_of_thought(self, sequence: Sequence) -> list[int]:
        """The tokens that end the reasoning when its budget has just been spent, else none."""
        if not sequence.assembler.in_reasoning:
            return []
        sequence.thoughts += 1
        budget = self._prompts.budget(sequence.request)
        spent = budget is not None and budget >= 0 and sequence.thoughts == budget + 1
        return self._prompts.thought_end.tolist() if spent else []

    def _emit(self, sequence: Sequence, text: str, reasoning: str) -> None:
        if reasoning:
            sequence.reasoning.append(reasoning)
            sequence.stream.put(Delta(reasoning, reasoning=True))
        if text:
            sequence.answer.append(text)
            sequence.stream.put(Delta(text))

    # -- the end ----------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, reason: FinishReason, error: NbinferError | None = None) -> None:
        """End a sequence; its slot keeps what it holds for the next prompt that begins alike."""
        sequence.done = True
        rest = sequence.assembler.finish()
        self._emit(sequence, rest.text, rest.reasoning)
        if sequence.slot >= 0:
            slot = self._slots[sequence.slot]
            slot.sequence = None
            slot.released = time.perf_counter()
            if reason != "error" and sequence.media is None:
                self._prefixes.finished(slot, sequence, self._schedule.waiting)
            else:
                self._prefixes.empty(slot)
        sequence.sampler.close()
        if sequence.scores is not None:
            self._finish_scoring(sequence, sequence.scores, reason, error)
        else:
            self._answer(sequence, reason, error)
        self._unfinished.discard(sequence)

    def _answer(self, sequence: Sequence, reason: FinishReason, error: NbinferError | None) -> None:
        """Hand out the result of a completion, or what went wrong."""
        matcher = sequence.sampler.matcher
        # The matcher has already taken forced tokens that no longer fitted in.
        cut = matcher is not None and (sequence.cut_short or not matcher.accepting)
        if error is None and reason == "length" and cut:
            error = cut_short(self._result(sequence, reason), f"{len(sequence.generated)} tokens")
        if error is not None:
            sequence.stream.fail(error)
        else:
            sequence.stream.put(Finished(self._result(sequence, reason)))

    def _finish_scoring(
        self, sequence: Sequence, scores: Scores, reason: FinishReason, error: NbinferError | None
    ) -> None:
        scores.left -= 1
        scores.cached = max(scores.cached, sequence.cached)
        if error is None and reason == "interrupted":
            error = EngineError("the scoring was interrupted.")
        if error is not None:
            sequence.stream.fail(error)
            with self._wake:  # its siblings need not go on
                self._cancelled.add(sequence.stream)
        elif scores.left == 0:
            result = ScoreResult(
                logprobs=scores.logprobs,
                prompt_tokens=len(sequence.prompt),
                cached_tokens=scores.cached,
                model=self._name,
                seconds=time.perf_counter() - sequence.submitted,
            )
            sequence.stream.put(Finished(result))

    def _result(self, sequence: Sequence, reason: FinishReason) -> Result:
        tally = sequence.tally
        return result_of(
            sequence,
            reason,
            model=self._name,
            prompt_tokens=len(sequence.prompt),
            drafted=tally.drafted,
            accepted=tally.accepted,
            speedup=tally.speedup,
        )
