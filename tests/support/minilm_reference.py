"""The forward pass of all-MiniLM-L6-v2 in numpy, float32: the reference for the converted model.

Written from the description of BERT (Devlin et al. 2018, arXiv:1810.04805) and the model's config.json; it
shares no code with the converter or with llama.cpp.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_erf = np.frompyfunc(math.erf, 1, 1)


class MiniLMReference:
    """A sentence encoder read from a Hugging Face model folder."""

    def __init__(self, folder: Path) -> None:
        self._weights: dict[str, NDArray[np.float32]] = load_file(folder / "model.safetensors")
        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def tokenize(self, text: str) -> list[int]:
        """Token ids, [CLS] and [SEP] included."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def embed(self, text: str) -> NDArray[np.float32]:
        """Return the mean of the last hidden states, normalised: float32 of shape (384,)."""
        hidden = self._hidden(self.tokenize(text)).mean(axis=0)
        unit: NDArray[np.float32] = hidden / np.linalg.norm(hidden)
        return unit

    def _hidden(self, ids: list[int]) -> NDArray[np.float32]:
        embeddings = "embeddings."
        x = (
            self._weights[embeddings + "word_embeddings.weight"][ids]
            + self._weights[embeddings + "position_embeddings.weight"][: len(ids)]
            + self._weights[embeddings + "token_type_embeddings.weight"][0]
        )
        x = self._layer_norm(x, embeddings + "LayerNorm")
        for i in range(self._config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}."
            attended = self._linear(
                self._attention(x, layer + "attention.self."), layer + "attention.output.dense"
            )
            x = self._layer_norm(x + attended, layer + "attention.output.LayerNorm")
            inner = _gelu(self._linear(x, layer + "intermediate.dense"))
            x = self._layer_norm(x + self._linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
        return x

    def _attention(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        n_tokens, width = x.shape
        heads = self._config["num_attention_heads"]

        def split(part: str) -> NDArray[np.float32]:
            return self._linear(x, name + part).reshape(n_tokens, heads, width // heads).transpose(1, 0, 2)

        scores = split("query") @ split("key").transpose(0, 2, 1) / math.sqrt(width / heads)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out: NDArray[np.float32] = (weights @ split("value")).transpose(1, 0, 2).reshape(n_tokens, width)
        return out

    def _linear(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        return x @ self._weights[name + ".weight"].T + self._weights[name + ".bias"]

    def _layer_norm(self, x: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(
            (centred**2).mean(axis=-1, keepdims=True) + np.float32(self._config["layer_norm_eps"])
        )
        normed: NDArray[np.float32] = centred / scale
        return normed * self._weights[name + ".weight"] + self._weights[name + ".bias"]


def _gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    out: NDArray[np.float32] = x * np.float32(0.5) * (1 + _erf(x / math.sqrt(2)).astype(np.float32))
    return out
