"""The llama.cpp adapter opens the demo models with what a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.tiny_models import write_tiny

from nbinfer import backends
from nbinfer.contract.config import ModelConfig
from nbinfer.contract.errors import ConfigError, ModelLoadError
from nbinfer.contract.modes import Mode
from nbinfer.contract.requests import CompletionRequest
from nbinfer.engines.llamacpp.library import LOG
from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine


def test_a_model_opens_answers_and_closes() -> None:
    backend = backends.for_format("gguf")
    assert backend.name == "llamacpp"
    config = ModelConfig(context_size=256, llamacpp={"reasoning-budget": 0})
    engine = backend.open(demo_path(), mode=Mode.COMPLETION, name="demo", config=config, threads=1)
    try:
        assert engine.info.context_size == 256
        assert engine.info.backend == "llamacpp"
        question = ({"role": "user", "content": "What is the capital of France?"},)
        result = engine.submit(CompletionRequest(messages=question, max_tokens=20)).result(60)
        assert "Paris" in result.text
    finally:
        engine.close()
    # Loaded into this process by now: the status is the same without the child that loads it.
    assert backend.status().usable


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(ModelLoadError) as caught:
        backends.get("llamacpp").open(broken, mode=Mode.COMPLETION)
    assert len(str(caught.value).splitlines()) <= 5


def test_an_option_that_the_engine_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean context_size"):
        backends.get("llamacpp").open(demo_path(), mode=Mode.COMPLETION, contextsize=5)


def test_experts_stay_in_main_memory_where_asked_and_the_text_is_the_same(tmp_path: Path) -> None:
    blocks = 3
    path = write_tiny(tmp_path / "mixture.gguf", "mixture", blocks=blocks)
    question = ({"role": "user", "content": "What is the capital of France?"},)
    texts = []
    for asked, moved in ((False, 0), (True, blocks), (1, 1)):
        since = LOG.mark()
        engine = backends.get("llamacpp").open(
            path, mode=Mode.COMPLETION, threads=1, context_size=256, experts_on_cpu=asked
        )
        try:
            said = [line for line in LOG.lines(since) if "_exps" in line and "overridden to CPU" in line]
            assert len(said) == 3 * moved, "gate, up and down of each block"
            texts.append(engine.submit(CompletionRequest(messages=question, max_tokens=16)).result(60).text)
        finally:
            engine.close()
    assert texts[0]
    assert texts[1:] == texts[:1] * 2
    with pytest.raises(ConfigError, match="experts_on_cpu"):
        backends.get("llamacpp").open(path, mode=Mode.COMPLETION, experts_on_cpu=-1)
