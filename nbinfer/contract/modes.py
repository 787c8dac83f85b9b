"""The four modes of a model and the paths that ask for them."""

from __future__ import annotations

from enum import StrEnum

from nbinfer.contract.errors import ConfigError


class Mode(StrEnum):
    """What a model is loaded for; the value is the wire name."""

    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANKING = "reranking"
    IMAGE_GENERATION = "image-generation"


_PATHS = {
    "/v1/chat/completions": Mode.COMPLETION,
    "/v1/completions": Mode.COMPLETION,
    "/v1/messages": Mode.COMPLETION,
    "/v1/messages/count_tokens": Mode.COMPLETION,
    "/v1/embeddings": Mode.EMBEDDING,
    "/v1/rerank": Mode.RERANKING,
    "/rerank": Mode.RERANKING,
    "/score": Mode.RERANKING,
    "/v1/images/generations": Mode.IMAGE_GENERATION,
}


def parse_mode(name: str) -> tuple[Mode, bool]:
    """Read a wire name leniently, case-sensitively.

    Returns
    -------
    tuple of Mode and bool
        The mode and True; for an unknown name ``(Mode.COMPLETION, False)``.
    """
    try:
        return Mode(name), True
    except ValueError:
        return Mode.COMPLETION, False


def mode_from_json(value: object) -> Mode:
    """Read a mode from a decoded JSON value, strictly.

    Raises
    ------
    ConfigError
        The value is not a string, or not one of the four names.
    """
    if isinstance(value, str):
        mode, known = parse_mode(value)
        if known:
            return mode
    raise ConfigError(f"mode={value!r:.60} is not known: it is one of {', '.join(Mode)} (lower case).")


def mode_for_path(path: str) -> Mode | None:
    """Return the mode that a request path asks for; None for a path that is none of ours (HTTP 404)."""
    return _PATHS.get(path)
