"""What travels between a served engine and its clients: OpenAI's shapes, and what they leave out.

Both ends use this module: the server, to say what went wrong and what an engine is; the client, to build
requests and to raise the same error that the engine raised.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from nbinfer.contract import errors
from nbinfer.contract.errors import ContextOverflow, NbinferError, NotSupported, SchemaError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import Sampling
from nbinfer.contract.results import Timings, TokenLogprob, Usage
from nbinfer.engines.protocol import EngineInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from nbinfer.contract.requests import CompletionRequest
    from nbinfer.contract.results import Result

# Class of error: HTTP status, OpenAI's type, OpenAI's code. The first that fits counts.
_STATUS: tuple[tuple[type[NbinferError], tuple[int, str, str | None]], ...] = (
    (ContextOverflow, (400, "invalid_request_error", "context_length_exceeded")),
    (errors.RequestError, (400, "invalid_request_error", None)),
    (errors.ConfigError, (400, "invalid_request_error", "invalid_configuration")),
    (SchemaError, (400, "invalid_request_error", "schema_not_satisfied")),
    (errors.SafetensorsParseError, (400, "invalid_request_error", "unreadable_model")),
    (errors.GGUFParseError, (400, "invalid_request_error", "unreadable_model")),
    (NotSupported, (400, "invalid_request_error", "not_supported")),
    (errors.ModelNotFound, (404, "invalid_request_error", "model_not_found")),
    (errors.DoesNotFit, (507, "server_error", "does_not_fit")),
    (errors.BackendUnavailable, (503, "server_error", "backend_unavailable")),
    (errors.EngineClosed, (503, "server_error", "model_unloaded")),
    (errors.ModelLoadError, (500, "server_error", "model_load_failed")),
    (NbinferError, (500, "server_error", None)),
)
# Too many requests, or not now.
_BUSY = (408, 425, 429, 503)
# A proxy without its server behind it.
_LATER = (502, 504)
_DENIED = (401, 403)
# HTTP status: Anthropic's type of the error.
_ANTHROPIC_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    421: "not_found_error",
    503: "overloaded_error",
}
RUNNER_LOST = "runner_lost"
"""Code of the error that a request gets when the process that served it died."""
STOPPING = "stopping"
"""Code of the error that a sidecar gives that is on its way out."""
DENIED = "denied"
"""Code of the error of a server that wants another key."""
NO_ANSWER = "no_answer"
"""Code of the error of a server that is not there, or says nothing."""


# -- errors ---------------------------------------------------------------------------------------------


def error_to_json(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body, in OpenAI's shape, that report an error."""
    unknown: tuple[int, str, str | None] = (500, "server_error", None)
    status, kind, code = next((found for family, found in _STATUS if isinstance(error, family)), unknown)
    code = getattr(error, "code", None) or code
    message = str(error) if isinstance(error, NbinferError) else f"the engine failed: {error!r:.500}"
    extra: dict[str, Any] = {"error": type(error).__name__}
    if isinstance(error, ContextOverflow):
        extra |= {"prompt_tokens": error.prompt_tokens, "context_size": error.context_size}
    if isinstance(error, SchemaError):
        extra["raw"] = error.raw
    return status, error_body(message, kind=kind, code=code, nbinfer=extra)


def error_body(
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    nbinfer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return an error in OpenAI's shape; ``nbinfer`` holds what its shape has no place for."""
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    if nbinfer:
        error["nbinfer"] = dict(nbinfer)
    return {"error": error}


class Unreachable(errors.EngineError):
    """The server does not answer, or says that it cannot now: the request may do elsewhere, or later."""


class Busy(Unreachable):
    """The server is there, and has too much to do now: the same request may do later.

    ``retry_after`` is how many seconds it asks to be left alone; 0: it does not say.
    """

    retry_after: float = 0.0


def shaped(path: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """Return an error's body in the shape of the API that a path is part of: OpenAI's, or Anthropic's."""
    if not path.startswith("/v1/messages"):
        return body
    kind = _ANTHROPIC_ERRORS.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}


class RunnerLost(Unreachable):
    """The process that served the request died; the message holds how, and the last lines of its log.

    ``report`` is the whole report, with 64 KiB or more of the log, where the process was ours.
    """

    code = RUNNER_LOST
    report: Any = None


def error_from_json(body: Any, status: int | None = None) -> NbinferError:
    """Return the error that a body in OpenAI's shape reports: of the class it had where it was raised."""
    found = body.get("error", body) if isinstance(body, dict) else {}
    if not isinstance(found, dict):
        found = {"message": str(found)}
    message = str(found.get("message") or f"the server answered {status or 'with an error'}: {body!r:.300}")
    extra = found.get("nbinfer")
    extra = extra if isinstance(extra, dict) else {}
    if found.get("code") == RUNNER_LOST:
        return RunnerLost(message)
    kind = getattr(errors, str(extra.get("error")), None)
    if kind is ContextOverflow:
        return ContextOverflow(
            message,
            prompt_tokens=int(extra.get("prompt_tokens", 0)),
            context_size=int(extra.get("context_size", 0)),
        )
    if kind is SchemaError:
        return SchemaError(message, raw=str(extra.get("raw", "")))
    if kind is errors.GGUFParseError:
        return errors.GGUFParseError(message.removeprefix("failed to parse GGUF: "))
    if kind is errors.SafetensorsParseError:
        return errors.SafetensorsParseError(message.removeprefix("failed to read safetensors: "))
    if found.get("code") == STOPPING:
        stopping = errors.EngineClosed(message)
        stopping.code = STOPPING  # type: ignore[attr-defined]
        return stopping
    if isinstance(kind, type) and issubclass(kind, NbinferError):
        return kind(message)
    return _by_status(message, found, status)


def _by_status(message: str, found: Mapping[str, Any], status: int | None) -> NbinferError:
    """Guess the class of another server's error."""
    # llama-server, vLLM and OpenAI each say it in their own way; only the first gives its numbers.
    code, kind = found.get("code"), str(found.get("type"))
    long = ("exceed_context_size" in kind, "exceed_context_size" in message, "context length" in message)
    if code == "context_length_exceeded" or any(long):
        asked, size = found.get("n_prompt_tokens"), found.get("n_ctx")
        if isinstance(asked, int) and isinstance(size, int):
            message = f"the prompt has {asked:,} tokens, and the context has room for {size:,}."
            return ContextOverflow(
                f"{message}\nShorten it, or load the model with a larger context_size.",
                prompt_tokens=asked,
                context_size=size,
            )
        return ContextOverflow(message)
    if status in (400, 413, 415, 422):
        return errors.RequestError(message)
    if status in (404, 421):
        return errors.ModelNotFound(message)
    if status in (405, 501):
        return NotSupported(message)
    if status in _BUSY:
        return Busy(message)
    if status in _DENIED:
        denied = errors.EngineError(message)
        denied.code = DENIED  # type: ignore[attr-defined]
        return denied
    if status in _LATER:
        return Unreachable(message)
    return errors.EngineError(message)


# -- what an engine is, and how a result came about -----------------------------------------------------


def info_to_json(info: EngineInfo) -> dict[str, Any]:
    """Return an engine's description as JSON-able values."""
    out = {field.name: getattr(info, field.name) for field in fields(info)}
    out["mode"] = str(info.mode)
    out["effective"] = {str(key): _plain(value) for key, value in info.effective.items()}
    return out


def info_from_json(value: Mapping[str, Any]) -> EngineInfo:
    """Read an engine's description; fields of a newer version are left out."""
    known = {field.name for field in fields(EngineInfo)}
    given = {key: item for key, item in value.items() if key in known}
    return EngineInfo(**{**given, "mode": Mode(given["mode"])})


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def details_to_json(result: Result) -> dict[str, Any]:
    """Return what OpenAI's shape of an answer has no place for, so that the client's result is whole."""
    return {
        "text": result.text,
        "reasoning": result.reasoning,
        "finish_reason": result.finish_reason,
        "tool_calls": [dict(call) for call in result.tool_calls],
        "prompt": result.prompt,
        "params": dict(result.params),
        "usage": asdict(result.usage),
        "timings": asdict(result.timings),
        "logprobs": None
        if result.logprobs is None
        else [[each.token, each.logprob, [list(pair) for pair in each.top]] for each in result.logprobs],
    }


def details_from_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``Result`` from :func:`details_to_json`'s form."""
    logprobs = value.get("logprobs")
    return {
        "text": value["text"],
        "reasoning": value["reasoning"],
        "finish_reason": value["finish_reason"],
        "tool_calls": tuple(value["tool_calls"]),
        "prompt": value["prompt"],
        "params": value["params"],
        "usage": _known(Usage, value["usage"]),
        "timings": _known(Timings, value["timings"]),
        "logprobs": None
        if logprobs is None
        else tuple(
            TokenLogprob(token, logprob, tuple((text, number) for text, number in top))
            for token, logprob, top in logprobs
        ),
    }


def _known(kind: type[Any], value: Mapping[str, Any]) -> Any:
    """Make a value of the fields that this version has."""
    names = {field.name for field in fields(kind)}
    return kind(**{key: item for key, item in value.items() if key in names})


# -- vectors --------------------------------------------------------------------------------------------


def vector_to_base64(vector: NDArray[np.float32]) -> str:
    """Return a vector as OpenAI's base64: little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")


def vectors_from_wire(data: Iterable[Any], dims: int | None = None) -> NDArray[np.float32]:
    """Read the vectors of an answer, each base64 or a list of numbers: float32 of shape (texts, dims).

    ``dims`` says that each is several vectors, those of a text's tokens: float32 of shape (tokens, dims).
    """
    import numpy as np

    rows = [
        np.frombuffer(base64.b64decode(each), "<f4")
        if isinstance(each, str)
        else np.asarray(each, np.float32)
        for each in data
    ]
    if dims is not None and rows:
        return np.concatenate([row.reshape(-1, dims) for row in rows]).astype(np.float32)
    return np.stack(rows).astype(np.float32) if rows else np.zeros((0, 0), np.float32)


# -- requests -------------------------------------------------------------------------------------------


def completion_body(request: CompletionRequest, *, own: bool) -> dict[str, Any]:  # noqa: C901 - field by field
    """Return the body of a completion request, without its model.

    Parameters
    ----------
    request
        Its ``messages`` make it a chat completion, its ``prompt`` a text completion.
    own
        The server is nbinfer's: everything goes as it is. Otherwise only what OpenAI-style servers
        understand, and what they cannot do raises.

    Raises
    ------
    NotSupported
        Another server cannot do what is asked.
    """
    body: dict[str, Any] = {}
    if request.messages is not None:
        body["messages"] = _with_images([dict(message) for message in request.messages], request.images)
    else:
        prompt = request.prompt
        body["prompt"] = list(prompt) if isinstance(prompt, tuple) else prompt
    body |= _sampling_body(request.sampling, own=own)
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.stop:
        body["stop"] = list(request.stop)
    if request.tools:
        body["tools"] = [dict(tool) for tool in request.tools]
    if request.logprobs is not None:
        body |= (
            {"logprobs": request.logprobs}
            if request.messages is None
            else {"logprobs": True, "top_logprobs": request.logprobs}
        )
    if own:
        body["priority"] = request.priority
        if request.constraint is not None:
            body["constraint"] = {
                "kind": request.constraint.kind,
                "value": _plain_json(request.constraint.value),
            }
        body["think"] = request.think
        body["reasoning_budget"] = request.reasoning_budget
        body["adapter"] = request.adapter
        return {key: value for key, value in body.items() if value is not None}
    if request.adapter is not None:
        raise NotSupported("an external server takes an adapter as a model of its own: load it by that name.")
    if request.think is not None:
        # llama-server, vLLM and SGLang read the switch here.
        body["chat_template_kwargs"] = {"enable_thinking": request.think}
    if request.reasoning_budget is not None:
        raise NotSupported(
            "an external server takes no reasoning_budget per request; use think=True or False."
        )
    return body | _response_format(request)


def _sampling_body(sampling: Sampling, *, own: bool) -> dict[str, Any]:
    defaults = Sampling()
    body: dict[str, Any] = {"temperature": sampling.temperature}
    if own or sampling.temperature > 0:
        body["top_p"] = sampling.top_p
    # Not OpenAI's own, but common to local servers: sent only when asked for.
    for name in ("top_k", "min_p"):
        if own or (sampling.temperature > 0 and getattr(sampling, name) != getattr(defaults, name)):
            body[name] = getattr(sampling, name)
    for name in ("repeat_penalty", "presence_penalty", "frequency_penalty"):
        if getattr(sampling, name) != getattr(defaults, name):
            body[name] = getattr(sampling, name)
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    return body


def _response_format(request: CompletionRequest) -> dict[str, Any]:
    constraint = request.constraint
    if constraint is None:
        return {}
    if request.messages is None:
        raise NotSupported("an external server constrains chat answers only: leave raw out.")
    if constraint.kind == "json":
        return {"response_format": {"type": "json_object"}}
    if constraint.kind == "json_schema":
        schema = _plain_json(constraint.value)
    elif constraint.kind == "choices":
        # Wrapped in an object, because that is the only shape that every server takes.
        schema = choices_schema(constraint.value)
    else:
        raise NotSupported(
            f"an external server takes no {constraint.kind} in OpenAI's API; use schema=, choices= or json=."
        )
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema},
        }
    }


def choices_schema(choices: Iterable[str]) -> dict[str, Any]:
    """Return the schema that asks an external server for one of some texts, under the key ``choice``."""
    return {
        "type": "object",
        "properties": {"choice": {"type": "string", "enum": list(choices)}},
        "required": ["choice"],
        "additionalProperties": False,
    }


def _plain_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _with_images(messages: list[dict[str, Any]], images: tuple[bytes, ...]) -> list[dict[str, Any]]:
    """Put the images into the last user message, as data URLs."""
    if not images:
        return messages
    parts = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:{_media_type(i)};base64,{base64.b64encode(i).decode()}"},
        }
        for i in images
    ]
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content")
            texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
            message["content"] = [*parts, *texts]
            return messages
    raise errors.RequestError("images need a user message to go with.")


def _media_type(image: bytes) -> str:
    for start, kind in ((b"\x89PNG", "png"), (b"\xff\xd8", "jpeg"), (b"GIF8", "gif"), (b"RIFF", "webp")):
        if image.startswith(start):
            return f"image/{kind}"
    return "application/octet-stream"
