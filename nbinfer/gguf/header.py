"""What the header of a GGUF file says, as values."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nbinfer.contract.modes import Mode
from nbinfer.gguf.types import file_type_label, pooling_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd


# Encoders: they see the whole text at once and keep no KV cache, so they cannot write.
_ENCODERS = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    },
)
_BLOCK = re.compile(r"blk\.(\d{1,4})\.")


class ArraySummary(NamedTuple):
    """An array (or a very long string) that was stepped over, not kept.

    ``element_type`` is a GGUF value type such as ``string`` or ``float32``, or ``char`` for a long string;
    ``length`` counts elements; ``offset`` is the byte in the file where the elements begin.
    """

    element_type: str
    length: int
    offset: int


class TensorInfo(NamedTuple):
    """One tensor of the file.

    ``shape`` is in the file's order: in GGUF, the first dimension is the contiguous one. ``type`` is ``F32``,
    ``Q4_K``, …; ``offset`` counts bytes from the start of the data of its file; ``part`` is the file, counted
    from 0, of a split model.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int
    part: int = 0

    @property
    def n_elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the weights are stored.

    ``label`` is the usual name (``Q4_K_M``); ``mix`` maps each tensor type to its bytes, most bytes first.
    """

    label: str
    mix: Mapping[str, int]

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo], label: str | None = None) -> Quantisation:
        """Return the mix of some tensors; without a label, it is the type with most bytes, or ``none``."""
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[tensor.type] += tensor.n_bytes
        mix = dict(sizes.most_common())
        return cls(next(iter(mix), "none") if label is None else label, mix)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Header:
    """The header of a GGUF model.

    Attributes
    ----------
    source
        Path or address of the (first) file.
    version
        GGUF version, 2 or 3.
    alignment
        Tensor data begins at multiples of this many bytes.
    data_offset
        Byte in the (first) file where tensor data begins.
    file_size
        Bytes of all files together.
    metadata
        Keys as in the file. Scalars, strings and arrays of up to 4 KiB (as tuples) are kept; larger ones are
        :class:`ArraySummary`.
    tensors
        All tensors, in file order.
    files
        The files of the model; more than one when it is split.
    """

    source: str
    version: int
    alignment: int
    data_offset: int
    file_size: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    files: tuple[str, ...] = ()
    # The entries that are not about the tokenizer, as the file's own bytes: what `stripped` writes again.
    # None when they are too large to be kept.
    _plain_entries: bytes | None = field(default=b"", repr=False)
    _n_plain_entries: int = field(default=0, repr=False)

    def get(self, key: str, default: Any = None) -> Any:
        """Return ``{architecture}.{key}`` when the file has it, else ``key``, else ``default``."""
        prefixed = f"{self.architecture}.{key}"
        if prefixed in self.metadata:
            return self.metadata[prefixed]
        return self.metadata.get(key, default)

    def _text(self, key: str) -> str:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def _number(self, key: str) -> int | None:
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def architecture(self) -> str:
        """``general.architecture``, such as ``llama``; empty when the file does not say."""
        return self._text("general.architecture")

    @property
    def name(self) -> str:
        """``general.name``; empty when the file does not say."""
        return self._text("general.name")

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template (untrusted text from the file), or None."""
        return self._text("tokenizer.chat_template") or None

    @property
    def context_length(self) -> int | None:
        """Trained context in tokens."""
        return self._number("context_length")

    @property
    def n_layers(self) -> int | None:
        """Number of blocks."""
        return self._number("block_count")

    @property
    def n_vocab(self) -> int:
        """Number of tokens of the tokenizer; without a tokenizer, the declared vocabulary size, or 0."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, ArraySummary):
            return tokens.length
        if isinstance(tokens, tuple):
            return len(tokens)
        return self._number("vocab_size") or 0

    @cached_property
    def parameters(self) -> int:
        """Number of weights, over all tensors."""
        return sum(tensor.n_elements for tensor in self.tensors)

    @cached_property
    def quantisation(self) -> Quantisation:
        """Label and mix of the weights' types."""
        number = self.metadata.get("general.file_type")
        return Quantisation.of(self.tensors, file_type_label(number) if isinstance(number, int) else None)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def pooling(self) -> str | None:
        """How a text becomes one vector: ``mean``, ``cls``, ``last`` or ``rank``; None when not said."""
        number = self._number("pooling_type")
        return None if number is None else pooling_name(number)

    @property
    def kind(self) -> Literal["model", "projector", "adapter", "vocabulary", "other"]:
        """What the file holds: a whole model, or a part that only works beside one."""
        general = self._text("general.type")
        if general == "adapter" or "adapter.type" in self.metadata:
            return "adapter"
        if general == "mmproj" or self.architecture == "clip":
            return "projector"
        if general == "imatrix" or not self.architecture:
            return "other"
        return "model" if self.tensors else "vocabulary"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What the model can be loaded for; empty for a file that is no language model."""
        if self.kind not in ("model", "vocabulary"):
            return ()
        if self.pooling == "rank":
            return (Mode.RERANKING,)
        if self.pooling in ("mean", "cls", "last") or self.architecture in _ENCODERS:
            return (Mode.EMBEDDING,)
        return (Mode.COMPLETION,)

    def tensors_frame(self) -> pd.DataFrame:
        """Return one row per tensor: name, shape, type, elements, bytes, offset, part, layer."""
        import pandas as pd

        blocks = [_BLOCK.match(tensor.name) for tensor in self.tensors]
        layer = [None if block is None else int(block[1]) for block in blocks]
        return pd.DataFrame(
            {
                "name": pd.Series([t.name for t in self.tensors], dtype="str"),
                "layer": pd.array(layer, dtype="Int64"),
                "shape": pd.Series([t.shape for t in self.tensors], dtype="object"),
                "type": pd.Categorical([t.type for t in self.tensors]),
                "elements": pd.array([t.n_elements for t in self.tensors], dtype="int64"),
                "bytes": pd.array([t.n_bytes for t in self.tensors], dtype="int64"),
                "offset": pd.array([t.offset for t in self.tensors], dtype="int64"),
                "part": pd.array([t.part for t in self.tensors], dtype="int64"),
            },
        )
