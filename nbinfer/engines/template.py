"""A model's chat template, run as the untrusted program that it is.

A GGUF file from the internet carries Jinja code. It runs in Jinja's immutable sandbox: no attribute tricks,
no changes to what it is given, no files.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jinja2 import Template

MAX_TEMPLATE_CHARS = 1 << 20
MAX_PROMPT_CHARS = 1 << 28


class ChatTemplate:
    """Renders conversations to the text a model was trained on.

    Parameters
    ----------
    source
        The Jinja text.
    bos_token, eos_token
        What ``bos_token`` and ``eos_token`` mean in it.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(
                f"the model's chat template has {len(source):,} characters; "
                f"the limit is {MAX_TEMPLATE_CHARS:,}."
            )
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token

    @cached_property
    def _compiled(self) -> Template:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            autoescape=False,
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as e:
            raise TemplateError(
                f"the model's chat template is not valid Jinja (line {e.lineno}): {e.message}\n"
                "Use raw=True to send the prompt without a template.",
            ) from e

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt for a conversation.

        Raises
        ------
        TemplateError
            The template refused the conversation, or tried something the sandbox forbids.
        """
        from jinja2 import TemplateError as JinjaError
        from jinja2.exceptions import SecurityError

        try:
            text = self._compiled.render(
                messages=[dict(m) for m in messages],
                tools=[dict(t) for t in tools] or None,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                **variables,
            )
        except TemplateError:
            raise
        except SecurityError as e:
            raise TemplateError(
                f"the model's chat template tried something that is not allowed: {e}\n"
                "Do not trust this file. Use raw=True to send the prompt without a template.",
            ) from e
        except (
            JinjaError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as e:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise TemplateError(
                f"the model's chat template failed on a conversation of {roles}: {e}\n"
                "Some templates take no system message: put it into the prompt, or use raw=True.",
            ) from e
        if len(text) > MAX_PROMPT_CHARS:
            raise TemplateError(
                f"the rendered prompt has {len(text):,} characters; the limit is {MAX_PROMPT_CHARS:,}."
            )
        return text


def _tojson(value: Any, indent: int | None = None, **_options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the model's chat template refused this conversation: {message}")


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)  # noqa: DTZ005 - templates mean the local date
