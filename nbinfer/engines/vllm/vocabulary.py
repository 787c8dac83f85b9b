"""A model's tokenizer as the engines use it: whole prompts, plain text, and what ends an answer."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.engines.plaintext import SEAM, control_pattern
from nbinfer.engines.template import ChatTemplate

if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Sequence


class Vocabulary:
    """Text to token ids and back. Callable from any thread.

    Parameters
    ----------
    tokenizer
        The model's, as transformers loads it.
    name
        The model's name, for messages.
    size
        Rows of the model's output: tokens from 0 to this.
    ends
        Tokens that end an answer beside the tokenizer's own, from the model's generation configuration.
    chat_template
        A template that replaces the model's own; empty: its own.

    Raises
    ------
    NotSupported
        The model has no tokenizer of the ``tokenizers`` library.
    """

    def __init__(
        self, tokenizer: Any, *, name: str, size: int, ends: Iterable[int] = (), chat_template: str = ""
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise NotSupported(
                f"{name} has no tokenizer.json, which a model in the kernel needs.\n"
                "Load it with where='sidecar': vLLM's own server reads other tokenizers too."
            )
        # Copies of our own: those that vLLM shares with transformers cut and pad as the last caller wished.
        self._spelled = _copy(backend)
        self._plain = _copy(backend)
        self._plain.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.size = size
        own = tokenizer.eos_token_id
        self.ends = frozenset(ends) | ({own} if isinstance(own, int) else frozenset())
        self._template = chat_template

    def tokenize(self, text: str, *, special: bool, add_special: bool) -> list[int]:
        """Token ids of a text.

        ``special`` reads control tokens written out in it; ``add_special`` adds what the tokenizer puts
        around a text.
        """
        tokenizer = self._spelled if special else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def tokenize_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered prompt, which brings all its control tokens; it is cut at its seams."""
        ids: list[int] = []
        for part in text.split(SEAM):
            ids += self._spelled.encode(part, add_special_tokens=False).ids
        return ids

    def pair(self, query: str, document: str) -> list[int]:
        """Token ids of a query and a document together, as a ranking model reads them."""
        ids: list[int] = self._spelled.encode(query, document).ids
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens written out.

        Raises
        ------
        RequestError
            A token is not in the vocabulary.
        """
        self.check(tokens)
        decoded: str = self._spelled.decode(list(tokens), skip_special_tokens=False)
        return decoded

    def check(self, tokens: Iterable[int], what: str = "token") -> None:
        """Refuse tokens that are not in the vocabulary.

        Raises
        ------
        RequestError
            One is not.
        """
        for token in tokens:
            if not 0 <= token < self.size:
                raise RequestError(f"{what} {token} is outside the vocabulary (0 to {self.size - 1}).")

    @cached_property
    def controls(self) -> re.Pattern[str] | None:
        """Matches control tokens written out; None when the model has none."""
        added = self._spelled.get_added_tokens_decoder().values()
        return control_pattern(token.content for token in added if token.special)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The model's chat template; None when it has none."""
        source = self._template or self._tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default") or next(iter(source.values()), None)
        if not source:
            return None
        return ChatTemplate(
            source, bos_token=self._tokenizer.bos_token or "", eos_token=self._tokenizer.eos_token or ""
        )


def _copy(backend: Any) -> Any:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy
