"""Files from plain addresses, downloaded once into the cache folder."""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from nbinfer.contract.errors import ModelLoadError, ModelNotFound
from nbinfer.gguf.remote import MAX_PARTS
from nbinfer.gguf.split import part_of
from nbinfer.models.hub import HubFile, RemoteModel, check_room
from nbinfer.models.stores import downloads_dir

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from nbinfer.models.hub import Confirm

PAUSES: Final = (1.0, 3.0, 9.0)  # seconds before each new attempt that follows one without progress
_TIMEOUT = 30.0
_PARTIAL, _WHOLE = 206, 200
_FINAL = (400, 401, 403, 404, 410, 416, 451)  # asking again does not help
_LOCK_SECONDS = 3600.0
_NAME = re.compile(r"[^/\\:\0]{1,200}\.gguf", re.IGNORECASE)


def remote_file(url: str) -> RemoteModel:
    """Ask a server about a GGUF file; downloads nothing.

    Raises
    ------
    ModelNotFound
        The address does not name a GGUF file, or the server does not give it.
    """
    from nbinfer.gguf.remote import RemoteReader
    from nbinfer.gguf.source import SourceError

    names = _names(url)
    try:
        with RemoteReader() as reader:
            sources = [reader.open(_beside(url, name), first=1) for name in names]
    except SourceError as error:
        raise ModelNotFound(str(error)) from None
    part = part_of(names[0])
    return RemoteModel(
        ref=url,
        name=part.stem if part else names[0][: -len(".gguf")],
        format="gguf",
        files=tuple(HubFile(name, s.size, etag=s.etag) for name, s in zip(names, sources, strict=True)),
        address=_beside(url, names[0]),
        folder=_folder(url),
    )


def downloaded(url: str) -> Path | None:
    """Return the first file of what was downloaded from an address; None when it is not here, or not whole.

    What is here is used without asking the server again.

    Raises
    ------
    ModelNotFound
        The address does not name a GGUF file.
    """
    paths = [_folder(url) / name for name in _names(url)]
    return paths[0] if all(path.is_file() for path in paths) else None


def _names(url: str) -> list[str]:
    """Return the names of all files of the model at an address."""
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not _NAME.fullmatch(name):
        raise ModelNotFound(f"{_shown(url)} does not end in the name of a .gguf file.")
    part = part_of(name)
    if part is None:
        return [name]
    if part.total > MAX_PARTS:
        raise ModelNotFound(f"{name} is one of {part.total:,} parts; up to {MAX_PARTS:,} are possible.")
    return [part.sibling(n) for n in range(1, part.total + 1)]


def _folder(url: str) -> Path:
    # One folder for each address, so that two files of one name stay apart.
    key = hashlib.sha256(_shown(_beside(url, "")).encode()).hexdigest()[:12]
    return downloads_dir() / f"{urlsplit(url).hostname}-{key}"


def fetch_file(model: RemoteModel, *, confirm: Confirm | None = None) -> Path:
    """Download the files of a model, from where it broke off; returns the first one.

    Raises
    ------
    ModelNotFound
        The server does not give a file.
    ModelLoadError
        There is not enough room on the disk, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    missing = [file for file in model.files if not (model.folder / file.name).is_file()]
    if missing:
        if confirm is not None:
            confirm(model)
        check_room(_shown(model.ref), sum(file.n_bytes for file in missing), model.folder)
    try:
        for file in missing:
            model.folder.mkdir(parents=True, exist_ok=True)
            target = model.folder / file.name
            with FileLock(model.folder / f".{file.name}.lock", timeout=_LOCK_SECONDS):
                if not target.is_file():  # another process may have fetched it meanwhile
                    _fetch(_beside(model.address, file.name), target, file)
    except Timeout:
        raise ModelLoadError(
            f"another process has been downloading {_shown(model.ref)} for an hour."
        ) from None
    except OSError as error:
        raise ModelLoadError(
            f"{_shown(model.ref)} cannot be stored in {model.folder}: {error.strerror}."
        ) from error
    return model.folder / model.files[0].name


def _fetch(url: str, target: Path, file: HubFile) -> None:
    import httpx
    from huggingface_hub.utils.tqdm import tqdm

    # Parts of two versions are never joined: each version has a part of its own.
    version = hashlib.sha256(f"{file.etag} {file.n_bytes}".encode()).hexdigest()[:8]
    part = target.with_name(f".{target.name}.{version}.part")
    size = file.n_bytes
    failures = 0
    begun = _size(part) or 0
    bar: Any = tqdm(total=size, unit="B", unit_scale=True, desc=target.name, initial=begun)  # type: ignore[no-untyped-call]
    with bar, httpx.Client(timeout=_TIMEOUT, follow_redirects=True, max_redirects=5) as client:
        while (have := _size(part) or 0) < size:
            try:
                _append(client, url, part, have, size, bar)
                problem = "it sends less than the whole file"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem = str(error) or type(error).__name__
            if (_size(part) or 0) > have:
                failures = 0
                continue
            if failures == len(PAUSES):
                raise ModelNotFound(
                    f"{_shown(url)}: the server stopped after {have:,} of {size:,} bytes: {problem}.\n"
                    "What arrived is kept; the next attempt goes on from there.",
                )
            time.sleep(PAUSES[failures])
            failures += 1
    part.replace(target)


def _append(client: httpx.Client, url: str, part: Path, have: int, size: int, bar: Any) -> None:
    """Make one request for the bytes from ``have`` on, and write what arrives."""
    wanted = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", url, headers=wanted) as response:
        if response.status_code in _FINAL:
            raise ModelNotFound(f"{_shown(url)}: the server answers {response.status_code}.")
        response.raise_for_status()
        said = response.headers.get("Content-Range", "")
        if response.status_code == _PARTIAL and said != f"bytes {have}-{size - 1}/{size}":
            raise ModelNotFound(f"{_shown(url)}: asked for bytes from {have:,}, the server sends {said!r}.")
        if response.status_code == _WHOLE and have:
            have = 0
            bar.reset(size)
        with part.open("r+b" if part.exists() else "wb") as file:
            file.seek(have)
            file.truncate()
            for chunk in response.iter_raw():
                missing = chunk[: size - file.tell()]
                file.write(missing)
                bar.update(len(missing))
                if file.tell() == size:
                    return


def _beside(url: str, name: str) -> str:
    scheme, host, path, query, _ = urlsplit(url)
    return urlunsplit((scheme, host, path.rpartition("/")[0] + "/" + quote(name), query, ""))


def _shown(url: str) -> str:
    """Return an address without its query, which may hold a signature."""
    return urlunsplit((*urlsplit(url)[:3], "", ""))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
