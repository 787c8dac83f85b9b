"""A model's weights and vocabulary: loading, tokenising, and what the file says about itself."""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nbinfer.contract.errors import ConfigError, EngineClosed, ModelLoadError
from nbinfer.engines.llamacpp.library import (
    LOG,
    library,
    main_memory,
    may_rearrange_weights,
    untiled_weights,
)
from nbinfer.engines.plaintext import SEAM, control_pattern
from nbinfer.memory.probe.abi import buffer_overrides
from nbinfer.memory.settings import expert_patterns

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


class Weights:
    """One loaded model file.

    Parameters
    ----------
    path
        The GGUF file, or the first file of a split one.
    gpu_layers
        Layers on the GPU: None or -1 is all of them where there is a GPU, 0 is none.
    mmap
        Map the file instead of reading it into memory.
    experts_on_cpu
        True keeps the experts of a mixture in main memory, a number those of so many first blocks.
    on_progress
        Called with the fraction loaded, 0 to 1, from the loading thread.

    Raises
    ------
    ConfigError
        ``experts_on_cpu`` is neither a boolean nor a number of blocks.
    ModelLoadError
        llama.cpp refused the file; the message holds its reason.
    """

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int | None = None,
        mmap: bool = True,
        main_gpu: int | None = None,
        tensor_split: Sequence[float] | None = None,
        experts_on_cpu: bool | int = False,
        on_progress: Callable[[float], None] | None = None,
    ) -> None:
        lib = self._lib = library()
        self.path = path
        self.name = path.stem
        self._forked = False
        self.gpu_layers = gpu_layers
        params = lib.llama_model_default_params()
        params.n_gpu_layers = -1 if gpu_layers is None else gpu_layers
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mmap else lib.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = may_rearrange_weights()
        if main_gpu is not None:
            params.main_gpu = main_gpu
        if tensor_split is not None:
            shares = (ctypes.c_float * lib.LLAMA_MAX_DEVICES)(*tensor_split)
            params.tensor_split = shares
        places = dict(untiled_weights())
        if experts_on_cpu:
            places |= dict.fromkeys(expert_patterns(_experts(experts_on_cpu)), main_memory())
        if places:
            rules = buffer_overrides(places)
            params.tensor_buft_overrides = ctypes.addressof(rules)
        self._cancelled = threading.Event()
        self._guard = threading.RLock()

        @lib.llama_progress_callback  # type: ignore[misc]
        def progress(fraction: float, _user_data: ctypes.c_void_p) -> bool:
            if on_progress is not None:
                on_progress(fraction)
            return not self._cancelled.is_set()

        params.progress_callback = progress
        self.pointer: Any = None
        self._load(params, gpu_layers)
        self._vocab = lib.llama_model_get_vocab(self.pointer)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self._pieces: dict[int, bytes] = {}

    def _load(self, params: Any, gpu_layers: int | None) -> None:
        """Load on a worker thread, so that an interrupt is seen at once and cancels the load."""
        since = LOG.mark()

        def work() -> None:
            self.pointer = self._lib.llama_model_load_from_file(str(self.path).encode(), params)

        worker = threading.Thread(target=work, name="nbinfer-load", daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(0.1)
        except BaseException:
            self._cancelled.set()
            worker.join()
            self.close()
            raise
        if not self.pointer:
            raise ModelLoadError(_load_failure(self.path, LOG.errors(since), gpu_layers))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep the weights from being freed meanwhile; for threads other than the engine's.

        Raises
        ------
        EngineClosed
            They have been freed.
        """
        if self._forked:
            raise EngineClosed(
                f"{self.name} was loaded before this process was forked and cannot run here: "
                "load it in this process, or use threads."
            )
        with self._guard:
            if not self.pointer:
                raise EngineClosed(f"{self.name} was unloaded; load it again with nb.load.")
            yield

    def abandon(self) -> None:
        """Refuse all use: this is a forked child, where the engine's thread does not exist."""
        self._forked = True

    # -- vocabulary -------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool, add_special: bool) -> NDArray[np.int32]:
        """Token ids of ``text``, int32 of shape (n,).

        ``special`` reads control tokens written out in the text; ``add_special`` adds the beginning and end
        tokens the model asks for. Callable from any thread.
        """
        data = text.encode("utf-8", "surrogatepass")
        size = len(data) + 4
        tokens = np.empty(size, np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        n = self._lib.llama_tokenize(self._vocab, data, len(data), pointer, size, add_special, special)
        if n < 0:
            tokens = np.empty(-n, np.int32)
            pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            n = self._lib.llama_tokenize(self._vocab, data, len(data), pointer, -n, add_special, special)
        return tokens[:n]

    def piece(self, token: int) -> bytes:
        """The bytes of a token; control tokens have none. A piece may hold half a character."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self.render_piece(token, special=False)
        return piece

    def render_piece(self, token: int, *, special: bool) -> bytes:
        """The bytes of a token, with control tokens written out when ``special``."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def text(self, tokens: Sequence[int] | NDArray[np.int32]) -> str:
        """The text of tokens, control tokens written out."""
        return b"".join(self.render_piece(int(t), special=True) for t in tokens).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends the model's turn."""
        return token in self.end_tokens

    def token_kind(self, token: int) -> tuple[bool, bool]:
        """Whether a token is a control token, and whether it is one that the model's makers added."""
        attributes = self._lib.llama_vocab_get_attr(self._vocab, token)
        return (
            bool(attributes & self._lib.LLAMA_TOKEN_ATTR_CONTROL),
            bool(attributes & self._lib.LLAMA_TOKEN_ATTR_USER_DEFINED),
        )

    @cached_property
    def control_texts(self) -> re.Pattern[str] | None:
        """Matches what control tokens look like written out; None when the model has none."""
        texts = {
            self.render_piece(token, special=True).decode("utf-8", "replace")
            for token in range(self.n_vocab)
            if self.token_kind(token)[0]
        }
        return control_pattern(texts)

    def tokenize_rendered(self, text: str, *, add_special: bool) -> NDArray[np.int32]:
        """Tokens of a rendered prompt: the template's control tokens count, those inside messages do not.

        Messages have been through :func:`~nbinfer.engines.plaintext.defused_message`.
        """
        if SEAM not in text:
            return self.tokenize(text, special=True, add_special=add_special)
        parts = text.split(SEAM)
        tokens = [self.tokenize(parts[0], special=True, add_special=add_special)]
        tokens += [self.tokenize(part, special=True, add_special=False) for part in parts[1:]]
        return np.concatenate(tokens)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end generation (end of turn, of text, of sequence)."""
        lib, vocab = self._lib, self._vocab
        return frozenset(t for t in range(self.n_vocab) if lib.llama_vocab_is_eog(vocab, t))

    def special_token(self, name: str) -> int | None:
        """Id of ``bos``, ``eos``, ``sep``…; None when the model has none."""
        token = getattr(self._lib, f"llama_vocab_{name}")(self._vocab)
        return None if token < 0 else int(token)

    def special_text(self, name: str) -> str:
        """Text of ``bos``, ``eos``…; empty when the model has none."""
        token = self.special_token(name)
        return "" if token is None else self.render_piece(token, special=True).decode("utf-8", "replace")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a beginning-of-sequence token in front."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def vocab(self) -> Any:
        """llama.cpp's vocabulary pointer."""
        return self._vocab

    # -- what the file says -----------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """A metadata value as text; None when absent."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1

    def chat_template(self, name: str | None = None) -> str | None:
        """The model's Jinja chat template (or a named variant); None when it has none."""
        found = self._lib.llama_model_chat_template(self.pointer, name.encode() if name else None)
        return found.decode("utf-8", "replace") if found else None

    @property
    def trained_context_size(self) -> int:
        """Tokens of context the model was trained for."""
        return int(self._lib.llama_model_n_ctx_train(self.pointer))

    @property
    def embedding_size(self) -> int:
        """Components of the model's output vectors."""
        return int(self._lib.llama_model_n_embd_out(self.pointer))

    @property
    def reads_with_an_encoder(self) -> bool:
        """Whether the text goes through an encoder first (T5 and its kind)."""
        return bool(self._lib.llama_model_has_encoder(self.pointer))

    @property
    def window(self) -> int:
        """Tokens that blocks with a sliding window look back; 0 where no block has one."""
        return int(self._lib.llama_model_n_swa(self.pointer))

    @property
    def has_recurrent_state(self) -> bool:
        """Whether each sequence carries a state of fixed size."""
        lib, model = self._lib, self.pointer
        return bool(lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model))

    def close(self) -> None:
        """Free the weights; idempotent. No context of this model may be alive."""
        with self._guard:
            if self.pointer:
                self._lib.llama_model_free(self.pointer)
                self.pointer = None


def _experts(asked: Any) -> bool | int:
    if not isinstance(asked, int) or asked < 0:
        raise ConfigError(
            f"experts_on_cpu={asked!r:.40}: True, or of how many first blocks they stay in main memory."
        )
    return asked


def _load_failure(path: Path, errors: list[str], gpu_layers: int | None) -> str:
    """Turn llama.cpp's own words into a headline and a fix."""
    reason = next(
        (line for line in errors if "error loading model" in line), errors[0] if errors else "no reason given"
    )
    reason = reason.split("error loading model:")[-1].strip()[:300]
    lowered = " ".join(errors).lower()
    if "unknown model architecture" in lowered:
        fix = "This llama.cpp does not know the architecture: upgrade with pip install -U llama-cpp-python."
    elif "out of memory" in lowered or "failed to allocate" in lowered or "unable to allocate" in lowered:
        less = "gpu_layers=0 or a smaller value" if gpu_layers != 0 else "a smaller quantisation"
        fix = f"There is not enough free memory: try {less}, or unload other models."
    else:
        fix = (
            "The file may be damaged or made for another version: download it again, "
            "or check it with `nbinfer estimate`."
        )
    return f"cannot load {path.name}: {reason}\n{fix}"
