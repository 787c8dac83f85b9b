"""A loaded model's card."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from support.fake_engine import FakeEngine
from support.hostile import CORPUS, problems

import nbinfer
from nbinfer.contract.memory import RequiredMemory
from nbinfer.contract.modes import Mode
from nbinfer.display.style import STYLE
from nbinfer.session import Model


def card(model: Model) -> str:
    return str(nbinfer.rendering.mimebundle(model)[0]["text/html"])


def test_it_names_the_mode_the_place_and_what_it_got() -> None:
    engine = FakeEngine(context_size=4096, parallel=8, mode=Mode.EMBEDDING)
    data, _ = Model(engine=engine, name="m", backend="llamacpp", mode=Mode.EMBEDDING)._repr_mimebundle_()
    assert data["text/plain"] == "<Model m (embedding, llamacpp, kernel, context 4,096)>"
    for part in ("embedding", "in this kernel", "context 4,096 tokens", "8 dimensions", "8 requests at once"):
        assert part in data["text/html"]
    assert "RAM" not in data["text/html"]


@dataclass
class Estimate:
    required: RequiredMemory


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (RequiredMemory(3 << 30), "3 GiB RAM"),
        (Estimate(RequiredMemory(1 << 20, (2 << 30,))), "1 MiB RAM · 2 GiB GPU"),
        (RequiredMemory(0, (1 << 30, 2 << 30)), "0 B RAM · 1 GiB GPU 0 · 2 GiB GPU 1"),
    ],
)
def test_the_memory_it_was_estimated_to_take(memory: object, words: str) -> None:
    assert words in card(Model(engine=FakeEngine(), name="m", estimated=lambda: memory))


@pytest.mark.parametrize("text", CORPUS.values(), ids=list(CORPUS))
def test_a_hostile_name_is_inert(text: str) -> None:
    assert problems(card(Model(engine=FakeEngine(), name=text, where=text, backend=text)), style=STYLE) == []
