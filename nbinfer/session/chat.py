"""A conversation: what was said so far goes along with each question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.session.asking import with_images

if TYPE_CHECKING:
    from nbinfer.contract.results import Result
    from nbinfer.session.model import Model


class Chat:
    """A conversation with one model; ``messages`` is its history."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self.messages: list[dict[str, Any]] = []
        self.clear()

    def send(self, prompt: str, **options: Any) -> Result:
        """Ask, and keep both the question and the answer. A failed or interrupted turn is not kept."""
        asked = [*self.messages, {"role": "user", "content": with_images(prompt, options.pop("images", ()))}]
        result = self._model.infer(messages=asked, **options)
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        return result

    def clear(self) -> None:
        """Forget the conversation, keep the system prompt."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
