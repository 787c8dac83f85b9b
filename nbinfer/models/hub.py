"""Models on the Hugging Face hub: what they would take, and their download into the hub's own cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import quote

from nbinfer.contract.errors import ModelLoadError, ModelNotFound
from nbinfer.gguf.pipeline import INDEX, PLAIN_SUFFIXES, weight_files
from nbinfer.gguf.split import part_of
from nbinfer.models.cache import cache_dir
from nbinfer.models.files import ModelFiles, projector_for, stem_and_quant
from nbinfer.models.refs import HubRef, choose
from nbinfer.models.stores import hf_cache, hf_files, hf_snapshots

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.gguf import Header
    from nbinfer.gguf.pipeline import PipelineHeader
    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.models.files import Format

# What an engine for safetensors reads besides the weights.
_SMALL_FILES: Final = (".json", ".txt", ".jinja", ".model", ".tiktoken")
_MAX_SMALL: Final = 64 * 1024**2


@dataclass(frozen=True)
class HubFile:
    """A file on a server: its name, its bytes, its SHA-256 or else its version, where the server says it."""

    name: str
    n_bytes: int
    sha256: str | None = None
    etag: str | None = None


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """A model that is not on this disk yet.

    Attributes
    ----------
    ref
        The reference that means it.
    name
        A short name to show.
    files
        What would be downloaded, weights first.
    n_bytes
        Bytes of all of it.
    address
        Of the first file; of a safetensors model, of its folder.
    folder
        Where it would be stored.
    headers
        What to send with requests for it, such as a token; not shown.
    """

    ref: str
    name: str
    format: Format
    files: tuple[HubFile, ...]
    address: str
    folder: Path
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def free_disk(self) -> int:
        """Bytes that are free where it would be stored."""
        return free_disk(self.folder)

    @cached_property
    def header(self) -> Header | SafetensorsHeader | PipelineHeader:
        """What its header says, read from the server without the weights.

        Raises ``GGUFParseError`` or ``SafetensorsParseError`` when it cannot be read.
        """
        if self.format == "diffusers":
            from nbinfer.gguf.pipeline import read_remote_pipeline

            names = [file.name for file in self.files]
            return read_remote_pipeline(self.address, names, headers=self.headers)
        if self.format == "safetensors":
            from nbinfer.gguf.safetensors import read_remote_safetensors

            return read_remote_safetensors(self.address, headers=self.headers)
        from nbinfer.gguf.remote import read_remote_header

        return read_remote_header(self.address, headers=self.headers, cache=cache_dir("headers"))


Confirm: TypeAlias = Callable[[RemoteModel], object]
"""Called before the first byte of weights; raises to refuse the download."""


def local(ref: HubRef) -> ModelFiles | None:
    """Return the files of a model in the hub's cache; None when it is not there, or not whole."""
    folder = hf_cache() / f"models--{ref.repo.replace('/', '--')}"
    for snapshot, branch in hf_snapshots(folder):
        if ref.revision not in (None, branch) and not snapshot.name.startswith(str(ref.revision)):
            continue
        whole = {file: files for file, files in hf_files(snapshot).items() if not files.missing}
        try:
            chosen = choose(whole, file=ref.file, quant=ref.quant, where=str(ref))
        except ModelNotFound:
            continue
        if (files := whole.get(chosen or "")) is not None:
            return files
    return None


def remote(ref: HubRef) -> RemoteModel:
    """Ask the hub about a model; downloads nothing.

    Raises
    ------
    ModelNotFound
        There is no such repository, revision or file, or no access to it, or no network.
    """
    import huggingface_hub as hub

    endpoint = _endpoint()
    if _offline():
        raise ModelNotFound(f"{ref} is not on this disk, and HF_HUB_OFFLINE forbids to look on the hub.")
    with _hub_errors(ref):
        info = hub.HfApi(endpoint=endpoint).model_info(ref.repo, revision=ref.revision, files_metadata=True)
    there = {
        sibling.rfilename: HubFile(
            sibling.rfilename,
            sibling.size or 0,
            getattr(sibling.lfs, "sha256", None),
        )
        for sibling in info.siblings or ()
    }
    chosen = choose(there, file=ref.file, quant=ref.quant, where=str(HubRef(ref.repo, revision=ref.revision)))
    pipeline = [] if chosen else _pipeline_files(there)
    names = _gguf_files(there, chosen) if chosen else pipeline or _safetensors_files(there)
    if not names:
        raise ModelNotFound(
            f"{ref} holds no GGUF files, no config.json with safetensors files and no image pipeline."
        )
    short = ref.repo.rpartition("/")[2]
    quant = stem_and_quant(chosen.rpartition("/")[2])[1] if chosen else None
    token = hub.get_token()
    return RemoteModel(
        ref=str(ref),
        name=f"{short}:{quant}" if quant else short,
        format="gguf" if chosen else "diffusers" if pipeline else "safetensors",
        files=tuple(there[name] for name in names),
        address=f"{endpoint}/{ref.repo}/resolve/{quote(ref.revision or 'main', safe='')}"
        + (f"/{chosen}" if chosen else ""),
        folder=hf_cache(),
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )


def _gguf_files(there: dict[str, HubFile], chosen: str) -> list[str]:
    part = part_of(chosen)
    names = [part.sibling(n) for n in range(1, part.total + 1)] if part else [chosen]
    missing = [name for name in names if name not in there]
    if missing:
        raise ModelNotFound(
            f"{chosen} is one of {len(names)} files, of which {missing[0]} is not on the hub."
        )
    folder = chosen.rpartition("/")[0]
    beside = [name for name in there if "mmproj" in name.lower() and name.rpartition("/")[0] in ("", folder)]
    projector = projector_for(Path(), chosen, beside, alone=True)
    return [*names, projector.as_posix()] if projector else names


def _safetensors_files(there: dict[str, HubFile]) -> list[str]:
    top = [name for name in sorted(there) if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    if any(name.startswith("model") for name in weights):
        # Some repositories hold the same weights again in another layout.
        weights = [name for name in weights if name.startswith("model")]
    if not weights or "config.json" not in there:
        return []
    small = [name for name in top if name.endswith(_SMALL_FILES) and there[name].n_bytes <= _MAX_SMALL]
    return weights + small


def _pipeline_files(there: dict[str, HubFile]) -> list[str]:
    """Return the files of an image pipeline: data only, and of each part's weights one variant."""
    if INDEX not in there:
        return []
    names = [INDEX]
    for folder in sorted({name.partition("/")[0] for name in there if name.count("/") == 1}):
        inside = [name for name in sorted(there) if name.startswith(f"{folder}/")]
        names += weight_files(inside)[0]
        names += [
            name
            for name in inside
            if name.endswith(PLAIN_SUFFIXES)
            and not name.endswith(".safetensors")
            and there[name].n_bytes <= _MAX_SMALL
        ]
    return names


def fetch(model: RemoteModel, ref: HubRef, *, confirm: Confirm | None = None) -> ModelFiles:
    """Download a model into the hub's cache, from where it broke off; returns its files.

    Shows the hub library's progress bars. The SHA-256 of each weight file is checked when the hub says it.

    Raises
    ------
    ModelNotFound
        The hub does not give a file.
    ModelLoadError
        There is not enough room on the disk, or a file is not what the hub says it is.
    """
    import huggingface_hub as hub

    if confirm is not None:
        confirm(model)
    missing = [
        file
        for file in model.files
        if not isinstance(hub.try_to_load_from_cache(ref.repo, file.name, model.folder, ref.revision), str)
    ]
    check_room(model.ref, sum(file.n_bytes for file in missing), model.folder)
    for file in missing:
        with _hub_errors(ref):
            path = hub.hf_hub_download(
                ref.repo, file.name, revision=ref.revision, endpoint=_endpoint(), cache_dir=model.folder
            )
        _check_digest(Path(path), file)
    files = local(
        HubRef(ref.repo, model.files[0].name if model.format == "gguf" else None, None, ref.revision)
    )
    if files is None:
        raise ModelLoadError(
            f"{ref} was downloaded, but is not whole in {model.folder}.\nDelete it there and try again."
        )
    return files


def _check_digest(path: Path, file: HubFile) -> None:
    if file.sha256 is None:
        return
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != file.sha256:
        # It was downloaded just now and is of no use: the next attempt must not find it.
        real = Path(os.path.realpath(path))
        path.unlink()
        real.unlink(missing_ok=True)
        raise ModelLoadError(
            f"{file.name} is not what the hub says it is: its SHA-256 is {digest[:12]}… instead of"
            f" {file.sha256[:12]}….\nIt was deleted; download it again.",
        )


def free_disk(folder: Path) -> int:
    """Return the bytes that are free where ``folder`` is, or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_room(what: str, n_bytes: int, folder: Path) -> None:
    """Check that a download has room.

    Raises
    ------
    ModelLoadError
        It has not.
    """
    free = free_disk(folder)
    if n_bytes > free:
        raise ModelLoadError(
            f"{what} takes {n_bytes / 1e9:,.1f} GB on disk; {folder} has {free / 1e9:,.1f} GB left.\n"
            "Make room, or choose a smaller quantisation.",
        )


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", os.environ.get("TRANSFORMERS_OFFLINE", "")).upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    )


@contextmanager
def _hub_errors(ref: HubRef) -> Iterator[None]:
    """Say the hub library's errors in few words, with the fix."""
    from huggingface_hub import errors

    # Of whichever HTTP library the hub library uses; it also covers a broken or refused connection.
    http_error: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    try:
        yield
    except errors.GatedRepoError:
        raise ModelNotFound(
            f"{ref} is gated: accept its terms at https://huggingface.co/{ref.repo},"
            " then log in (hf auth login) or set HF_TOKEN.",
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFound(
            f"there is no model {ref.repo} on Hugging Face, or it is private.\n"
            "Check the name, or log in (hf auth login) or set HF_TOKEN.",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFound(f"{ref.repo} has no revision {ref.revision}.") from None
    except errors.EntryNotFoundError as error:
        raise ModelNotFound(f"{ref}: {_first_line(error)}") from None
    except (http_error, errors.OfflineModeIsEnabled, OSError) as error:
        raise ModelNotFound(
            f"{ref} is not on this disk, and Hugging Face does not answer: {_first_line(error)}"
        ) from error


def _first_line(error: Any) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
