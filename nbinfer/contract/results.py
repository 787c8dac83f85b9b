"""What comes back: results and the events that lead to them."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from nbinfer.contract import rendering
from nbinfer.contract.errors import RequestError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from nbinfer.contract.requests import Message

FinishReason: TypeAlias = Literal["stop", "length", "interrupted", "error"]

# The info string after backticks holds none itself: "```x``` is code" opens nothing. A fence that is never
# closed (a cut answer) goes to the end.
_FENCE = re.compile(
    r"^ {0,3}(?:(?P<ticks>`{3,})[^`\n]*|(?P<tildes>~{3,})[^\n]*)\n"
    r"(?P<code>.*?)"
    r"(?:^ {0,3}(?(ticks)(?P=ticks)`*|(?P=tildes)~*)[ \t\r]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts.

    ``cached_tokens`` of the prompt were not computed again. Of ``drafted_tokens`` that speculative decoding
    guessed, ``accepted_tokens`` were right.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in seconds.

    ``queue_seconds`` from submission to the first prompt token; ``prompt_seconds`` to the end of the prompt;
    ``generation_seconds`` from there to the last token; ``first_token_seconds`` from submission to the first
    token.
    """

    queue_seconds: float = 0.0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    first_token_seconds: float | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    speculative_speedup: float | None = None
    """Of the steps that guessed: the time their tokens would have taken one by one, over what they took."""

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Prompt tokens computed (cached ones do not count) per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second, from the end of the prompt to the last token."""
        # The first token comes with the prompt's last logits: n tokens take n - 1 further steps.
        steps = self.generated_tokens - 1
        return steps / self.generation_seconds if steps > 0 and self.generation_seconds > 0 else None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token, its natural-log probability, and the most likely alternatives."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


_MOST_SURPRISED = 700.0  # beyond, a float has no room for its exponential


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How sure a model was of each token: what :meth:`Result.show_logprobs` returns. Shows itself coloured.

    Where an answer was constrained, the probabilities are those before the constraint: a low one then says
    that the model would have written something else.
    """

    tokens: tuple[TokenLogprob, ...]
    model: str = ""

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative log-probability: 1 is certain, n as unsure as between n equal ones."""
        if not self.tokens:
            return 1.0
        mean = sum(each.logprob for each in self.tokens) / len(self.tokens)
        return math.exp(min(-mean, _MOST_SURPRISED))

    def to_frame(self) -> pd.DataFrame:
        """One row per token: token, probability, and the most likely tokens instead as a dict, best first."""
        import pandas as pd

        rows = [
            {
                "token": each.token,
                "probability": math.exp(each.logprob),
                "instead": {text: math.exp(value) for text, value in each.top if text != each.token},
            }
            for each in self.tokens
        ]
        return pd.DataFrame(rows, columns=["token", "probability", "instead"])

    def __repr__(self) -> str:
        return str(rendering.mimebundle(self)[0]["text/plain"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        del include, exclude
        return rendering.mimebundle(self)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer to one prompt.

    ``text`` is the raw answer without reasoning; ``parsed`` is the typed value when a schema was given;
    ``finish_reason`` is ``stop``, ``length``, ``interrupted`` or ``error``. ``prompt`` is the text that
    reached the model, chat template applied; ``params`` what was asked, with the seed that was drawn.
    """

    text: str
    reasoning: str | None = None
    parsed: Any = None
    finish_reason: FinishReason = "stop"
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    model: str = ""
    prompt: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] | None = None
    error: str | None = None
    continue_with: Callable[..., Result] | None = field(default=None, repr=False, compare=False)
    """Set by the model that answered; what :meth:`reply` calls."""

    def __str__(self) -> str:
        return self.text

    def __getstate__(self) -> dict[str, Any]:
        # The model that answered stays where it is; a copy elsewhere can be read, not continued.
        return {**self.__dict__, "continue_with": None}

    @property
    def code(self) -> str | None:
        """The first fenced code block, without its fence; None when there is none."""
        found = _FENCE.search(self.text)
        return found.group("code").removesuffix("\n") if found else None

    def show_logprobs(self) -> Logprobs:
        """Show how sure the model was of each token; the answer needs ``logprobs=k`` when it is asked for.

        Raises
        ------
        RequestError
            The answer was made without.
        """
        if self.logprobs is None:
            raise RequestError(
                "this answer has no log-probabilities.\n"
                "Ask with them: nb.infer(prompt, logprobs=3), or %infer --logprobs 3 … in a cell."
            )
        return Logprobs(self.logprobs, self.model)

    def reply(self, prompt: str, **options: Any) -> Result:
        """Continue the conversation: the messages so far, this answer, and ``prompt``.

        Raises
        ------
        RequestError
            The result came from a raw prompt, or was not made by a loaded model.
        """
        if self.continue_with is None or self.messages is None:
            raise RequestError(
                "this result is not part of a conversation; use m.infer(messages=[…]) instead."
            )
        history = [
            *self.messages,
            {"role": "assistant", "content": self.text},
            {"role": "user", "content": prompt},
        ]
        return self.continue_with(messages=history, **options)

    def with_changes(self, **changes: Any) -> Result:
        """Copy with some fields replaced."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON-able values (``parsed`` as it is)."""
        skip = {"continue_with", "usage", "timings", "logprobs"}
        out: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k not in skip}
        out["usage"] = asdict(self.usage)
        out["timings"] = asdict(self.timings)
        out["logprobs"] = None if self.logprobs is None else [asdict(lp) for lp in self.logprobs]
        return out

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        """Safe HTML and plain text, never Markdown: what a model writes must not run in the page."""
        del include, exclude
        return rendering.mimebundle(self)


@dataclass(frozen=True, kw_only=True)
class EmbeddingResult:
    """Vectors, float32 of shape (texts, dimensions), and the token count of each text.

    A model loaded with ``pooling="none"`` gives a vector for each token of each text: shape (tokens,
    dimensions), in the order of the texts. ``finish_reason`` is ``stop``, or ``interrupted`` when the request
    was cancelled; then there are no vectors, shape (0, dimensions), and no counts.
    """

    vectors: NDArray[np.float32]
    n_tokens: tuple[int, ...]
    finish_reason: FinishReason = "stop"
    model: str = ""
    seconds: float = 0.0

    def by_text(self) -> list[NDArray[np.float32]]:
        """The vectors of each text, float32 of shape (tokens, dimensions), of a model that does not pool."""
        ends = list(itertools.accumulate(self.n_tokens))
        return [self.vectors[end - n : end] for n, end in zip(self.n_tokens, ends, strict=True)]


@dataclass(frozen=True, kw_only=True)
class RerankResult:
    """Scores, float32 of shape (documents,), in the order of the documents.

    ``finish_reason`` is ``stop``, or ``interrupted`` when the request was cancelled: then there are none.
    """

    scores: NDArray[np.float32]
    n_tokens: tuple[int, ...]
    finish_reason: FinishReason = "stop"
    model: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """Natural-log probability of each answer followed by the end of the turn, float64 of shape (answers,)."""

    logprobs: NDArray[np.float64]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    model: str = ""
    seconds: float = 0.0

    def probabilities(self) -> NDArray[np.float64]:
        """Shares of the answers among themselves, shape (answers,), summing to 1."""
        import numpy as np

        weights = np.exp(self.logprobs - self.logprobs.max())
        shares: NDArray[np.float64] = weights / weights.sum()
        return shares


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """One image: its PNG file, and the seed that gives it again.

    ``png`` carries the prompt, the seed and the other settings in its text chunks (``parameters`` as people's
    tools for such images read them, ``nbinfer`` as JSON). ``flagged``: the pipeline's own safety checker
    blackened it.
    """

    png: bytes = field(repr=False)
    seed: int
    width: int
    height: int
    flagged: bool = False

    @property
    def pil(self) -> Any:
        """The image as a PIL image; pixels are read when they are first used."""
        import io

        from PIL import Image

        return Image.open(io.BytesIO(self.png))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the PNG file as it is, prompt and seed in it; returns its path."""
        from pathlib import Path

        target = Path(path).expanduser()
        target.write_bytes(self.png)
        return target

    def _repr_png_(self) -> bytes:
        return self.png


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """The images that were made for one prompt; shows itself as a gallery.

    ``finish_reason`` is ``stop``, or ``interrupted`` when only some of them were finished. ``params`` are the
    settings that were used, defaults and the drawn seed included.
    """

    images: tuple[GeneratedImage, ...]
    prompt: str = ""
    finish_reason: FinishReason = "stop"
    params: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    seconds: float = 0.0
    error: str | None = None

    @property
    def image(self) -> Any:
        """The first image as a PIL image.

        Raises
        ------
        RequestError
            None was finished.
        """
        if not self.images:
            raise RequestError("no image was finished before the request was stopped.")
        return self.images[0].pil

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[GeneratedImage]:
        return iter(self.images)

    def __getitem__(self, index: int) -> GeneratedImage:
        return self.images[index]

    def with_changes(self, **changes: Any) -> ImageResult:
        """Copy with some fields replaced."""
        return replace(self, **changes)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        del include, exclude
        return rendering.mimebundle(self)


@dataclass(frozen=True, slots=True)
class ImageProgress:
    """Step ``step`` of ``steps`` of image ``index`` of ``n`` is done.

    ``preview`` is a small PNG of what there is of it, at the steps for which one was asked.
    """

    index: int
    n: int
    step: int
    steps: int
    preview: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ImageDone:
    """Image ``index`` is finished."""

    index: int
    image: GeneratedImage


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """``done`` of ``total`` prompt tokens are in the context; ``cached`` of them came from a cache."""

    done: int
    total: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """New text. ``n_tokens`` tokens stand behind it; ``reasoning`` text is not part of the answer."""

    text: str
    n_tokens: int = 1
    reasoning: bool = False
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a stream."""

    result: Result | ScoreResult | EmbeddingResult | RerankResult | ImageResult


Event: TypeAlias = PromptProgress | Delta | ImageProgress | ImageDone | Finished
