"""The llama.cpp engine: one thread owns the context and serves many sequences at once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from nbinfer.contract.modes import Mode
    from nbinfer.engines.llamacpp.context import ContextSettings
    from nbinfer.engines.llamacpp.media import Projector
    from nbinfer.engines.llamacpp.saved import SavedStates
    from nbinfer.engines.llamacpp.speculate import Drafter, Speculation
    from nbinfer.engines.llamacpp.weights import Weights
    from nbinfer.engines.protocol import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculative:
    """How to guess ahead: ``draft_path`` is a small model's file; None looks phrases up in the text so far.

    ``num_tokens`` are guessed at most; guessing pauses while fewer than ``min_acceptance_rate`` (0 to 1) of
    the guesses are right, and whenever it costs time.
    """

    draft_path: Path | None = None
    num_tokens: int | None = None
    min_acceptance_rate: float | None = None


def open_engine(
    path: Path,
    *,
    mode: Mode,
    name: str = "",
    context_size: int | None = None,
    parallel: int | None = None,
    gpu_layers: int | None = None,
    kv_type: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    flash_attention: bool | None = None,
    pooling: str | None = None,
    mmap: bool = True,
    main_gpu: int | None = None,
    tensor_split: list[float] | None = None,
    experts_on_cpu: bool | int = False,
    reasoning_budget: int | None = None,
    exact: bool = False,
    speculative: Speculative | None = None,
    projector: Path | None = None,
    lora: str | Path | Mapping[str, str | Path] | None = None,
    prefix_cache: str | int | None = None,
    prefix_cache_folder: str | Path | None = None,
    digest: str = "",
    on_progress: Callable[[float], None] | None = None,
) -> Engine:
    """Load a GGUF file and return an engine for one mode.

    Parameters
    ----------
    path
        The GGUF file, or the first of a split one.
    context_size
        Tokens of context, shared by all sequences; -1 is the trained maximum; None is the trained maximum
        up to 4,096, and up to 2,048 for embeddings and ranking.
    parallel
        Sequences decoded at once; None chooses by model and mode.
    gpu_layers
        Layers on the GPU; None is all where there is one.
    kv_type
        Type of the KV cache: ``f16`` (default), ``q8_0``, ``q4_0``, …
    threads
        CPU threads; None is the cores less one.
    batch_size, micro_batch
        Tokens per decode call, and per computed graph.
    flash_attention
        None lets llama.cpp decide.
    pooling
        How an embedding model makes one vector of a text's: ``mean``, ``cls``, ``last``; ``none`` gives one
        for each token. None is what the file says; with one of the others any model makes embeddings.
    experts_on_cpu
        True keeps the experts of a mixture in main memory, a number those of so many first blocks; the rest
        goes where ``gpu_layers`` says.
    exact
        Give the same text to the last bit, whatever ran before or runs beside: one request at a time, no
        shared prefixes.
    speculative
        Guess tokens ahead and check them together; the text stays what it is.
    projector
        The image encoder (``mmproj`` file) of a vision model.
    lora
        A LoRA adapter file that is always on, or files by name: a request then says ``adapter=name``.
    prefix_cache
        Bytes (``"1GiB"``) for the states of chats that the context has no room for any more: putting one back
        is a copy, where computing it again takes as long as reading it took. None is none.
    prefix_cache_folder
        Keep these states in a folder, so that they outlive the process; ``prefix_cache`` then limits its size
        (None: 2 GiB). They hold the prompts' content: only this user can read them.

    Raises
    ------
    BackendUnavailable
        llama.cpp is not installed.
    ModelLoadError
        The file cannot be loaded, or there is not enough memory.
    ConfigError
        A setting is not valid for this model.
    """
    from nbinfer.engines.llamacpp.context import ContextSettings, engine_version
    from nbinfer.engines.llamacpp.weights import Weights

    settings = ContextSettings(
        context_size=context_size,
        parallel=parallel,
        kv_type=kv_type,
        threads=threads,
        batch_size=batch_size,
        micro_batch=micro_batch,
        flash_attention=flash_attention,
        pooling=pooling,
    )
    weights = Weights(
        path,
        gpu_layers=gpu_layers,
        mmap=mmap,
        main_gpu=main_gpu,
        tensor_split=tensor_split,
        experts_on_cpu=experts_on_cpu,
        on_progress=on_progress,
    )
    weights.name = name or path.stem
    described: dict[str, Any] = {"name": weights.name, "digest": digest}
    with ExitStack() as undo:
        undo.callback(weights.close)
        engine: Engine
        if mode == "completion":
            from nbinfer.engines.llamacpp.adapters import Adapters
            from nbinfer.engines.llamacpp.generate import CompletionEngine

            described |= {"reasoning_budget": reasoning_budget, "exact": exact}
            if lora is not None:
                described["adapters"] = Adapters(weights, _adapter_files(lora))
            if projector is not None:
                described["projector"] = _projector(weights, projector, settings)
                undo.callback(described["projector"].close)
            described["saved"] = _saved(
                prefix_cache,
                prefix_cache_folder,
                (digest or _file_identity(path), engine_version(), settings, _file_identities(lora)),
            )
            if speculative is not None:
                described["speculation"] = _speculation(speculative, weights, settings)
                undo.callback(described["speculation"].close)
            engine = CompletionEngine(weights, settings, **described)
        elif mode in ("embedding", "reranking"):
            from nbinfer.engines.llamacpp.pooled import PooledEngine

            engine = PooledEngine(weights, settings, mode=mode, **described)
        else:
            raise NotSupported(
                f"llama.cpp does not serve {mode!r}: it can do completion, embedding, reranking."
            )
        undo.pop_all()
        return engine


def _projector(weights: Weights, path: Path, settings: ContextSettings) -> Projector:
    from nbinfer.engines.llamacpp.library import default_threads
    from nbinfer.engines.llamacpp.media import Projector

    return Projector(weights, path, threads=settings.threads or default_threads())


_USUAL_FOLDER_BYTES = 2 << 30


def _saved(budget: str | int | None, folder: str | Path | None, identity: object) -> SavedStates | None:
    from pathlib import Path

    from nbinfer.contract.errors import ConfigError
    from nbinfer.contract.units import parse_bytes
    from nbinfer.engines.llamacpp.saved import SavedStates

    if budget is None and folder is None:
        return None
    limit = _USUAL_FOLDER_BYTES if budget is None else parse_bytes(budget)
    if folder is None:
        return SavedStates(limit)
    place = Path(folder).expanduser()
    try:
        return SavedStates(limit, place, identity=repr(identity))
    except OSError as e:
        raise ConfigError(f"prefix_cache_folder: {place} cannot be used: {e.strerror or e}.") from e


def _file_identity(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def _file_identities(lora: str | Path | Mapping[str, str | Path] | None) -> object:
    if lora is None:
        return None
    return sorted((name, _file_identity(path)) for name, path in _adapter_files(lora).items())


def _adapter_files(lora: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    from collections.abc import Mapping
    from pathlib import Path

    from nbinfer.contract.errors import ModelNotFound
    from nbinfer.engines.llamacpp.adapters import ALWAYS

    named = lora if isinstance(lora, Mapping) else {ALWAYS: lora}
    files = {name: Path(path).expanduser() for name, path in named.items()}
    for path in files.values():
        if not path.is_file():
            raise ModelNotFound(f"there is no adapter file {path}.")
    return files


def _speculation(asked: Speculative, weights: Weights, settings: ContextSettings) -> Speculation:
    from nbinfer.contract.errors import NotSupported
    from nbinfer.engines.llamacpp.speculate import (
        DEFAULT_TOKENS,
        DraftModel,
        PromptLookup,
        Speculation,
        check_vocabularies,
    )
    from nbinfer.engines.llamacpp.weights import Weights

    if weights.has_recurrent_state:
        raise NotSupported(
            f"{weights.path.stem} keeps its past in one state, which cannot take a wrong guess back: "
            "load it without speculative.",
        )
    drafter: Drafter = PromptLookup()
    if asked.draft_path is not None:
        draft = Weights(asked.draft_path)
        try:
            check_vocabularies(weights, draft)
            drafter = DraftModel(draft, settings)
        except BaseException:
            draft.close()
            raise
    return Speculation(
        drafter,
        num_tokens=asked.num_tokens or DEFAULT_TOKENS,
        min_acceptance_rate=asked.min_acceptance_rate,
    )
