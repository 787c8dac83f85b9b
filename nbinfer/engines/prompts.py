"""From a conversation to a prompt that may be computed: the rules that every engine keeps to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.contract.errors import ContextOverflow, NotSupported, RequestError
from nbinfer.engines.plaintext import defused_message

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence, Sized

    from nbinfer.contract.requests import CompletionRequest, Message
    from nbinfer.engines.protocol import EngineInfo
    from nbinfer.engines.template import ChatTemplate


def only_text(messages: Sequence[Message]) -> str | None:
    """Return the text of a single message of a user, which a model without a template can continue.

    None: there is more to the conversation than that.
    """
    if len(messages) != 1 or messages[0]["role"] != "user":
        return None
    content = messages[0].get("content")
    return content if isinstance(content, str) else None


def rendered(
    template: ChatTemplate | None,
    messages: Sequence[Message],
    request: CompletionRequest,
    *,
    name: str,
    controls: re.Pattern[str] | None,
    budget: int | None,
) -> str:
    """Return a conversation as the text that the model was trained on, seams in it.

    Parameters
    ----------
    template
        The model's chat template; None when it has none.
    messages
        The request's, images taken out of them where the engine does so.
    name
        The model's name, for messages.
    controls
        What matches the model's control tokens; see :mod:`nbinfer.engines.plaintext`.
    budget
        Tokens of reasoning allowed; 0 also asks the template for none, where the request does not say.

    Raises
    ------
    NotSupported
        The model has no template.
    TemplateError
        The template refused the conversation.
    """
    if template is None:
        raise NotSupported(
            f"{name} has no chat template: it is a base model that continues text.\n"
            "Send one prompt without a system message, or use raw=True.",
        )
    think = False if request.think is None and budget == 0 else request.think
    variables = {} if think is None else {"enable_thinking": think}
    safe = [defused_message(message, controls) for message in messages]
    return template.render(safe, tools=request.tools, **variables)


def check_length(n: int, info: EngineInfo) -> None:
    """Refuse a prompt of ``n`` tokens that is empty, or leaves no room for an answer.

    Raises
    ------
    RequestError
        It has no tokens.
    ContextOverflow
        It does not fit; the message names a context size that would do, where the model can have one.
    """
    size = info.context_size
    if n == 0:
        raise RequestError("the prompt is empty: it has no tokens.")
    if n < size:
        return
    larger, trained = 1 << (n + n // 4).bit_length(), info.trained_context_size
    if trained:
        larger = min(trained, larger)
    fix = (
        f"Load it with a larger context (context_size={larger}), or shorten the prompt."
        if larger > size
        else f"The model was trained for {trained:,} tokens at most: shorten the prompt."
    )
    raise ContextOverflow(
        f"the prompt has {n:,} tokens, but the context of {info.model} holds {size:,} "
        f"(prompt and answer together). {fix}",
        prompt_tokens=n,
        context_size=size,
    )


def check_texts(texts: Sequence[Sized], info: EngineInfo) -> None:
    """Refuse texts, given as their tokens, of which one is longer than a model of vectors or scores takes.

    Raises
    ------
    ContextOverflow
        One is; the message says which.
    """
    size = info.context_size
    for i, tokens in enumerate(texts):
        if len(tokens) > size:
            raise ContextOverflow(
                f"text {i} has {len(tokens):,} tokens, but {info.model} takes at most {size:,}. "
                "Shorten or split it.",
                prompt_tokens=len(tokens),
                context_size=size,
            )
