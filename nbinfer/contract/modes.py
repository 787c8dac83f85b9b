"""The four modes of a model and the paths that ask for them."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """What a model is loaded for; the value is the wire name."""

    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANKING = "reranking"
    IMAGE_GENERATION = "image-generation"
