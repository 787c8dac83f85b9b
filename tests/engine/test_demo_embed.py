"""The converted embedding model against an independent forward pass of the original weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.minilm_reference import MiniLMReference
from support.plain_llama import plain_llama

from nbinfer.models import demo

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

TEXTS = {
    "plain": "The cat sat on the mat.",
    "question": "How do I install a Python package with pip?",
    "accents are folded": "Café déjà vu: naïve résumé, 100% ÜBER!",
    "Cyrillic": "Привет, мир",
    "every Chinese character is a word": "日本語のテキスト",
    "one letter": "x",
    "code": "def f(x):\n    return x**2  # square",
    "long words in pieces": "unaffordable antidisestablishmentarianism 12345.678",
    "hundreds of tokens": "Jupyter notebooks combine code, text and plots. " * 24,
    "white space": "\t tabs  and   spaces\n\nnewlines",
    "unknown characters": "emoji 😀 test 🚀",
    "a number with punctuation": "Mt. Everest's height is 8,848 m (29,029 ft).",
}


@pytest.fixture(scope="module")
def reference() -> MiniLMReference:
    return MiniLMReference(demo._embed_source())


@pytest.fixture(scope="module")
def converted() -> Iterator[Any]:
    with plain_llama(demo.demo_embed_path(), embedding=True, n_ctx=512, n_batch=512, n_ubatch=512) as model:
        yield model


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_vectors_equal_those_of_the_original_weights(
    text: str, reference: MiniLMReference, converted: Any
) -> None:
    vector = np.asarray(converted.embed(text), dtype=np.float32)
    cosine = float(vector @ reference.embed(text) / np.linalg.norm(vector))
    assert cosine > 0.999


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_tokens_equal_those_of_the_original_tokenizer(
    text: str, reference: MiniLMReference, converted: Any
) -> None:
    assert converted.tokenize(text.encode(), special=False) == reference.tokenize(text)


def test_the_reference_tells_texts_apart(reference: MiniLMReference) -> None:
    cat, feline, stocks = (
        reference.embed(text)
        for text in (
            "The cat sat on the mat.",
            "A feline rested on the rug.",
            "The stock market fell sharply today.",
        )
    )
    assert cat @ feline > 0.5
    assert cat @ stocks < 0.2
