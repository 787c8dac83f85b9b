"""Files from plain addresses: asked about, resumed, never mixed, never half there."""

from __future__ import annotations

import functools
import re
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from support.file_server import FileServer, Request, ranges, whole
from support.model_stores import gguf, gguf_part, isolate

from nbinfer.contract.errors import DoesNotFit, ModelLoadError, ModelNotFound
from nbinfer.models import discover, download, hub, peek, pull, resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbinfer.models.hub import RemoteModel

DATA = gguf("served") + bytes(200_000)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0))
    return isolate(monkeypatch, tmp_path / "home")


def open_ended(request: Request, behaviour: Callable[[Request], None] = ranges) -> None:
    """Understand ``bytes=N-`` as well, as every server with ranges does."""
    match = re.fullmatch(r"bytes=(\d+)-", request.handler.headers.get("Range", ""))
    if match and request.data is not None:
        request.range = (int(match[1]), len(request.data) - 1)
    behaviour(request)


def leftovers(home: Path) -> list[str]:
    return sorted(
        p.name for p in (home / "nbinfer-cache").rglob("*") if p.is_file() and not p.name.endswith(".lock")
    )


@pytest.mark.parametrize("behaviour", [open_ended, whole], ids=["ranges", "no ranges"])
def test_a_file_is_downloaded_once_and_then_used_without_its_server(
    home: Path, behaviour: Callable[[Request], None]
) -> None:
    with FileServer({"/dir/m-Q8_0.gguf": DATA}, behaviour) as server:
        url = f"{server.address}/dir/m-Q8_0.gguf?signature=secret"
        remote = peek(url)
        assert remote.header.context_length == 512
        assert leftovers(home) == [] or leftovers(home)[0].endswith(".json")
        model = resolve(url)
    assert model.path.read_bytes() == DATA
    assert (model.name, model.source, model.ref) == ("m-Q8_0", "download", url)
    assert resolve(url).path == model.path  # the server is gone
    found = discover("download")[0]
    assert resolve(found.ref).path == model.path
    assert "secret" not in str(model.path)


def test_the_question_comes_before_the_weights(home: Path) -> None:
    def refuse(model: RemoteModel) -> None:
        raise DoesNotFit(
            f"{model.name}: {model.n_bytes:,} bytes, {getattr(model.header, 'n_layers', None)} layers."
        )

    with FileServer({"/m.gguf": DATA}, open_ended) as server:
        with pytest.raises(DoesNotFit, match=f"m: {len(DATA):,} bytes, 2 layers"):
            pull(f"{server.address}/m.gguf", confirm=refuse)
        # Only windows of the header were asked for, never the file from some byte on.
        assert all(re.fullmatch(r"bytes=0-\d+", r["Range"]) for r in server.requests)


def test_a_broken_download_goes_on_where_it_stopped(home: Path) -> None:
    starts: list[int] = []

    def breaks(request: Request) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", request.handler.headers.get("Range", ""))
        if request.range is not None:
            ranges(request)
            return
        first = int(match[1]) if match else 0
        starts.append(first)
        body = DATA[first : first + 90_000]
        headers = {"Content_Length": len(DATA) - first, "ETag": '"v1"'}
        if first:
            request.send(206, body, Content_Range=f"bytes {first}-{len(DATA) - 1}/{len(DATA)}", **headers)
        else:
            request.send(200, body, **headers)
        if first + len(body) < len(DATA):
            request.drop()

    with FileServer({"/m.gguf": DATA}, breaks) as server:
        assert resolve(f"{server.address}/m.gguf").path.read_bytes() == DATA
    assert starts[0] == 0
    assert len(starts) >= 3
    assert all(b > a for a, b in pairwise(starts))


def test_a_server_without_ranges_starts_again_and_the_file_is_right(home: Path) -> None:
    calls: list[int] = []

    def drops_once(request: Request) -> None:
        calls.append(1)
        if len(calls) == 2:
            request.send(200, DATA[:50_000], Content_Length=len(DATA), ETag='"v1"')
            request.drop()
        else:
            whole(request)

    with FileServer({"/m.gguf": DATA}, drops_once) as server:
        assert resolve(f"{server.address}/m.gguf").path.read_bytes() == DATA


def test_what_arrived_is_kept_for_the_next_attempt(home: Path) -> None:
    starts: list[str] = []

    def stops(request: Request, *, after: int) -> None:
        if request.range is not None:
            ranges(request)
            return
        starts.append(request.handler.headers.get("Range", ""))
        request.send(200, DATA[:after], Content_Length=len(DATA), ETag='"v1"')
        request.drop()

    with FileServer({"/m.gguf": DATA}, functools.partial(stops, after=100_000)) as server:
        url = f"{server.address}/m.gguf"
        with pytest.raises(
            ModelNotFound, match=r"the server stopped after 100,000 of .* bytes: .*\nWhat arrived is kept"
        ):
            resolve(url)
        assert [name.endswith(".part") for name in leftovers(home)] == [True]
        assert discover("download") == []
        server.behaviour = open_ended
        server.requests.clear()
        assert resolve(url).path.read_bytes() == DATA
        assert "bytes=100000-" in [r.get("Range") for r in server.requests]
    assert [name for name in leftovers(home) if name.endswith(".part")] == []


def test_parts_of_two_versions_are_never_joined(home: Path) -> None:
    other = gguf("newer!") + b"\1" * 200_000

    def stops(request: Request) -> None:
        if request.range is not None:
            ranges(request)
            return
        request.send(200, DATA[:100_000], Content_Length=len(DATA), ETag='"v1"')
        request.drop()

    with FileServer({"/m.gguf": DATA}, stops) as server:
        url = f"{server.address}/m.gguf"
        with pytest.raises(ModelNotFound):
            resolve(url)
        server.files["/m.gguf"] = other
        server.behaviour = functools.partial(open_ended, behaviour=functools.partial(ranges, etag='"v2"'))
        assert resolve(url).path.read_bytes() == other


def test_a_split_model_is_downloaded_whole(home: Path) -> None:
    files = {f"/m-0000{n}-of-00002.gguf": gguf_part(n, 2) for n in (1, 2)}
    with FileServer(files, open_ended) as server:
        model = resolve(f"{server.address}/m-00002-of-00002.gguf")
    assert [path.read_bytes() for path in model.paths] == list(files.values())


def too_much(request: Request) -> None:
    """Send more than was announced, for ever."""
    if request.range is not None:
        ranges(request)
        return
    request.send(200, DATA + b"more" * 1000, ETag='"v1"')


def test_a_server_that_sends_too_much_is_cut_off(home: Path) -> None:
    with FileServer({"/m.gguf": DATA}, too_much) as server:
        assert resolve(f"{server.address}/m.gguf").path.read_bytes() == DATA


def refuses_weights(request: Request, *, status: int) -> None:
    if request.range is not None:
        ranges(request)
    else:
        request.send(status)


def lies_about_the_range(request: Request) -> None:
    if request.range is not None:
        ranges(request)
    else:
        request.send(206, DATA, Content_Range=f"bytes 7-{len(DATA) + 6}/{len(DATA) + 7}")


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (functools.partial(refuses_weights, status=403), "the server answers 403"),
        (functools.partial(refuses_weights, status=500), "the server stopped after 0 of"),
        (lies_about_the_range, "asked for bytes from 0, the server sends"),
    ],
)
def test_a_bad_server_gets_a_clear_error(
    home: Path, behaviour: Callable[[Request], None], problem: str
) -> None:
    with FileServer({"/m.gguf": DATA}, behaviour) as server, pytest.raises(ModelNotFound, match=problem):
        resolve(f"{server.address}/m.gguf")


@pytest.mark.parametrize("path", ["/m.bin", "/", "", "/a%2Fb.gguf", "/m-00001-of-99999.gguf"])
def test_an_address_that_names_no_gguf_file_is_refused_without_asking(home: Path, path: str) -> None:
    with FileServer({}) as server:
        with pytest.raises(
            ModelNotFound, match=r"does not end in the name of a .gguf file|up to 1,000 are possible"
        ):
            resolve(f"{server.address}{path}")
        assert server.requests == []


def test_there_must_be_room(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "free_disk", lambda _: 10)
    with (
        FileServer({"/m.gguf": DATA}, open_ended) as server,
        pytest.raises(ModelLoadError, match="Make room"),
    ):
        resolve(f"{server.address}/m.gguf")


def test_a_folder_that_cannot_be_written_is_a_load_error(home: Path) -> None:
    (home / "nbinfer-cache").write_bytes(b"a file, not a folder")
    with (
        FileServer({"/m.gguf": DATA}, open_ended) as server,
        pytest.raises(ModelLoadError, match="cannot be stored in"),
    ):
        resolve(f"{server.address}/m.gguf")
