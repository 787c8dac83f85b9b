"""Modes: names, lenient and strict parsing, and the paths that ask for them."""

from __future__ import annotations

from typing import Any

import pytest

from nbinfer.contract.errors import ConfigError
from nbinfer.contract.modes import Mode, mode_for_path, mode_from_json, parse_mode


def test_the_wire_names_are_fixed() -> None:
    assert [str(mode) for mode in Mode] == ["completion", "embedding", "reranking", "image-generation"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("completion", (Mode.COMPLETION, True)),
        ("embedding", (Mode.EMBEDDING, True)),
        ("reranking", (Mode.RERANKING, True)),
        ("image-generation", (Mode.IMAGE_GENERATION, True)),
        ("Embedding", (Mode.COMPLETION, False)),
        ("EMBEDDING", (Mode.COMPLETION, False)),
        ("image_generation", (Mode.COMPLETION, False)),
        (" embedding", (Mode.COMPLETION, False)),
        ("chat", (Mode.COMPLETION, False)),
        ("", (Mode.COMPLETION, False)),
    ],
)
def test_lenient_parsing_answers_with_completion_and_not_known(
    name: str, expected: tuple[Mode, bool]
) -> None:
    assert parse_mode(name) == expected


@pytest.mark.parametrize("mode", list(Mode))
def test_json_reads_each_name_back(mode: Mode) -> None:
    assert mode_from_json(mode.value) is mode


@pytest.mark.parametrize(
    "value", ["Completion", "", "chat", None, 0, 1, True, ["completion"], {"mode": "completion"}]
)
def test_json_refuses_unknown_and_non_string_values(value: Any) -> None:
    with pytest.raises(ConfigError, match="completion, embedding, reranking, image-generation"):
        mode_from_json(value)


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("/v1/chat/completions", Mode.COMPLETION),
        ("/v1/completions", Mode.COMPLETION),
        ("/v1/embeddings", Mode.EMBEDDING),
        ("/v1/rerank", Mode.RERANKING),
        ("/rerank", Mode.RERANKING),
        ("/score", Mode.RERANKING),
        ("/v1/images/generations", Mode.IMAGE_GENERATION),
        ("/v1/score", None),
        ("/v1/models", None),
        ("/embeddings", None),
        ("/V1/embeddings", None),
        ("/v1/embeddings/", None),
        ("/x/v1/embeddings", None),
        ("", None),
    ],
)
def test_paths_map_to_modes_and_all_others_to_none(path: str, mode: Mode | None) -> None:
    assert mode_for_path(path) is mode
