"""From a request to the tokens of its prompt: raw text, token ids, a conversation, or one with images."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nbinfer.contract.errors import RequestError
from nbinfer.engines.llamacpp.media import take_images
from nbinfer.engines.plaintext import SEAM
from nbinfer.engines.prompts import only_text, rendered
from nbinfer.engines.template import ChatTemplate
from nbinfer.engines.text import THINK_CLOSE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nbinfer.contract.requests import CompletionRequest, Message
    from nbinfer.engines.llamacpp.media import Media, Projector
    from nbinfer.engines.llamacpp.weights import Weights


class Prompts:
    """Makes the prompts of one model; touches its vocabulary only, so any thread that holds it may call.

    Parameters
    ----------
    name
        The model's name, for messages.
    reasoning_budget
        Tokens of reasoning allowed where a request does not say; None or -1 is no limit.

    Raises
    ------
    TemplateError
        The model's chat template is too long to be one.
    """

    def __init__(self, weights: Weights, *, name: str, reasoning_budget: int | None) -> None:
        self._weights = weights
        self._name = name
        self._reasoning_budget = reasoning_budget
        source = weights.chat_template()
        self._template = (
            ChatTemplate(source, bos_token=weights.special_text("bos"), eos_token=weights.special_text("eos"))
            if source
            else None
        )

    def of(self, request: CompletionRequest) -> tuple[str, NDArray[np.int32]]:
        """Return the prompt of a request without images, and its tokens, int32."""
        weights = self._weights
        if isinstance(request.prompt, tuple):
            tokens = np.array(request.prompt, np.int32)
            if tokens.max() >= weights.n_vocab:
                raise RequestError(
                    f"token {tokens.max()} is outside the vocabulary (0 to {weights.n_vocab - 1})."
                )
            return weights.text(tokens), tokens
        if request.prompt is not None:
            return request.prompt, weights.tokenize(request.prompt, special=True, add_special=True)
        messages = request.messages or ()
        alone = only_text(messages) if self._template is None else None
        if alone is not None:
            return alone, weights.tokenize(alone, special=False, add_special=True)
        text = self._rendered(messages, request)
        tokens = weights.tokenize_rendered(text, add_special=self._adds_bos(text))
        return text.replace(SEAM, ""), tokens

    def with_images(self, request: CompletionRequest, projector: Projector) -> tuple[str, Media]:
        """Return the prompt of a request with images: its text, with markers, and its pieces."""
        messages, images = take_images(request)
        if not messages:
            raise RequestError("images go with messages, not with a raw prompt.")
        # Here the text is tokenised in one piece: a blank of no width takes the seam's place.
        text = self._rendered(messages, request).replace(SEAM, "\u200b")
        return text, projector.cut(text, images, add_special=self._adds_bos(text))

    def budget(self, request: CompletionRequest) -> int | None:
        """Tokens of reasoning allowed; None or -1 is no limit."""
        return self._reasoning_budget if request.reasoning_budget is None else request.reasoning_budget

    @cached_property
    def thought_end(self) -> NDArray[np.int32]:
        """Tokens that end the reasoning."""
        return self._weights.tokenize(f"\n{THINK_CLOSE}\n\n", special=True, add_special=False)

    def _rendered(self, messages: Sequence[Message], request: CompletionRequest) -> str:
        return rendered(
            self._template,
            messages,
            request,
            name=self._name,
            controls=self._weights.control_texts,
            budget=self.budget(request),
        )

    def _adds_bos(self, text: str) -> bool:
        """Many templates write the beginning token themselves; it must not come twice."""
        bos = self._weights.special_text("bos")
        return self._weights.adds_bos and not (bos and text.startswith(bos))
