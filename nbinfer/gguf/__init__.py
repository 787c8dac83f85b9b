"""Headers of model files: what a model is, read in milliseconds, without loading or trusting it."""

from __future__ import annotations

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf.header import ArraySummary, Header, Quantisation, TensorInfo
from nbinfer.gguf.read import read_header
from nbinfer.gguf.strip import data_size, stripped

__all__ = [
    "ArraySummary",
    "GGUFParseError",
    "Header",
    "Quantisation",
    "TensorInfo",
    "data_size",
    "read_header",
    "stripped",
]
