"""Headers over HTTP, from servers that behave, and from servers that do not."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from support.file_server import FileServer, Request, drip, ranges, stall, whole
from support.gguf_bytes import ARRAY, STRING, U16, Entry, small_model

from nbinfer.contract.errors import GGUFParseError
from nbinfer.gguf import read_header, remote
from nbinfer.gguf.parse import parse
from nbinfer.gguf.source import MemorySource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nbinfer.gguf import Header

VOCABULARY = Entry("tokenizer.big", (ARRAY, STRING), [f"token number {i}" for i in range(150_000)])
SMALL = small_model().bytes()
LARGE = small_model().plus(VOCABULARY).bytes()  # a header of 4 MB
HUGE_DATA = 10**12


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))


def same_but_for_its_source(header: Header, data: bytes) -> bool:
    here = parse(MemorySource(data))
    return replace(header, source="", files=()) == replace(here, source="", files=())


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("behaviour", [ranges, whole], ids=["ranges", "no ranges"])
def test_a_remote_header_equals_the_local_one(data: bytes, behaviour: Callable[[Request], None]) -> None:
    with FileServer({"/m.gguf": data}, behaviour) as server:
        header = read_header(f"{server.address}/m.gguf")
    assert same_but_for_its_source(header, data)
    assert header.source == f"{server.address}/m.gguf"


def test_windows_double_so_few_requests_are_made() -> None:
    with FileServer({"/m.gguf": LARGE}) as server:
        read_header(f"{server.address}/m.gguf")
    sizes = [
        int(last) - int(first) + 1
        for first, last in (r["Range"].removeprefix("bytes=").split("-") for r in server.requests)
    ]
    assert sizes[:2] == [2**20, 2**20]
    assert len(sizes) <= 4


def test_weights_are_not_downloaded() -> None:
    data = LARGE[: -(len(SMALL) // 2)]
    claimed = functools.partial(ranges, size=HUGE_DATA)
    with FileServer({"/m.gguf": data + bytes(4 * 2**20)}, claimed) as server:
        header = read_header(f"{server.address}/m.gguf")
    assert header.file_size == HUGE_DATA
    assert len(header.tensors) == 5


def test_a_dropped_connection_is_resumed_where_it_broke() -> None:
    def breaks(request: Request) -> None:
        assert request.data is not None
        assert request.range is not None
        first, last = request.range
        last = min(last, len(LARGE) - 1)
        length = last - first + 1
        body = request.data[first : first + min(length, 300_000)]
        request.send(206, body, Content_Range=f"bytes {first}-{last}/{len(LARGE)}", Content_Length=length)
        request.drop()

    with FileServer({"/m.gguf": LARGE}, breaks) as server:
        header = read_header(f"{server.address}/m.gguf")
    assert same_but_for_its_source(header, LARGE)
    starts = [int(r["Range"].removeprefix("bytes=").split("-")[0]) for r in server.requests]
    assert starts == sorted(set(starts))  # nothing is downloaded twice


def test_a_server_that_sends_less_than_asked_is_asked_again() -> None:
    def little(request: Request) -> None:
        assert request.range is not None
        request.range = (request.range[0], min(request.range[1], request.range[0] + 49_999))
        ranges(request)

    with FileServer({"/m.gguf": SMALL}, little) as server:
        assert same_but_for_its_source(read_header(f"{server.address}/m.gguf"), SMALL)


def test_a_busy_server_is_asked_again() -> None:
    def busy_twice(request: Request) -> None:
        if len(request.server.requests) < 3:
            request.send(503)
        else:
            ranges(request)

    with FileServer({"/m.gguf": SMALL}, busy_twice) as server:
        assert read_header(f"{server.address}/m.gguf").n_layers == 2


def lies(request: Request, content_range: str) -> None:
    request.send(206, SMALL, Content_Range=content_range)


def grows(request: Request) -> None:
    ranges(request, size=HUGE_DATA + len(request.server.requests))


def new_version(request: Request) -> None:
    ranges(request, etag=f'"v{len(request.server.requests)}"')


def closes(request: Request) -> None:
    request.drop()


def answers(request: Request, status: int) -> None:
    request.send(status, b"<html>no</html>")


def packs(request: Request) -> None:
    request.send(200, b"\x1f\x8b", Content_Encoding="gzip")


def circle(request: Request) -> None:
    request.send(302, Location=request.path)


def no_size(request: Request) -> None:
    request.send(200, Content_Length=None, Connection="close")
    request.drop()


def short(request: Request) -> None:
    ranges(request, size=len(SMALL) - 1000)


@pytest.mark.parametrize(
    ("behaviour", "problem"),
    [
        (
            functools.partial(lies, content_range="bytes 5-100/200"),
            "asked for bytes from 0, the server sends",
        ),
        (functools.partial(lies, content_range="bytes 0-100/50"), "asked for bytes from 0, the server sends"),
        (functools.partial(lies, content_range="bytes 0-100/*"), "asked for bytes from 0, the server sends"),
        (functools.partial(lies, content_range="0-100"), "asked for bytes from 0, the server sends"),
        (functools.partial(ranges, size=HUGE_DATA), "the server does not give the file at byte"),
        (short, "the file is cut off: 133,464 of 134,444 bytes are there"),
        (grows, "the file changed on the server"),
        (new_version, "the file changed on the server"),
        (closes, "the server does not give the file: "),
        (stall, "it is silent for 0.3 s"),
        (drip, "not complete after 1.5 s"),
        (functools.partial(answers, status=404), "no such file on the server (404)"),
        (functools.partial(answers, status=401), "the server refuses access (401)"),
        (functools.partial(answers, status=403), "needs a token"),
        (functools.partial(answers, status=418), "the server answers 418"),
        (functools.partial(answers, status=500), "it answers 500"),
        (functools.partial(answers, status=200), "does not begin with GGUF"),
        (packs, "packs the file"),
        (circle, "leads in a circle"),
        (no_size, "does not say how large the file is"),
    ],
)
def test_a_bad_server_gets_a_clear_error(behaviour: Callable[[Request], None], problem: str) -> None:
    cut = LARGE[:1_500_000] if "at byte" in problem or "changed" in problem else SMALL
    with FileServer({"/m.gguf": cut}, behaviour) as server, pytest.raises(GGUFParseError) as caught:
        read_header(f"{server.address}/m.gguf?signature=secret", timeout=0.3, deadline=1.5)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/m.gguf", "http://no-such-host.invalid/m.gguf", "http://"]
)
def test_an_address_that_leads_nowhere_gets_a_clear_error(url: str) -> None:
    with pytest.raises(GGUFParseError, match="the server does not give the file"):
        read_header(url, timeout=2)


def test_the_download_is_capped() -> None:
    with (
        FileServer({"/m.gguf": LARGE}) as server,
        pytest.raises(GGUFParseError, match="after 2,000,000 bytes"),
    ):
        read_header(f"{server.address}/m.gguf", max_download=2_000_000)


def test_a_token_goes_to_the_host_it_is_for_and_no_further() -> None:
    token = {"Authorization": "Bearer hf_secret"}
    with FileServer({"/file": SMALL}) as store:

        def redirect(request: Request) -> None:
            request.send(302, Location=f"http://localhost:{store.address.rpartition(':')[2]}/file")

        with FileServer({}, redirect) as hub:
            read_header(f"{hub.address}/m.gguf", headers=token)
    assert hub.requests[0]["Authorization"] == "Bearer hf_secret"
    assert all(
        "Authorization" not in request and "authorization" not in request for request in store.requests
    )


def test_a_split_model_is_read_from_any_of_its_parts() -> None:
    whole_model = small_model()
    no, count = Entry("split.no", U16, 0), Entry("split.count", U16, 2)
    files = {
        "/a/m-00001-of-00002.gguf": whole_model.plus(no, count).but(tensors=whole_model.tensors[:2]).bytes(),
        "/a/m-00002-of-00002.gguf": small_model(entries=[Entry("split.no", U16, 1), count])
        .but(tensors=whole_model.tensors[2:])
        .bytes(),
    }
    with FileServer(files) as server:
        header = read_header(f"{server.address}/a/m-00002-of-00002.gguf?download=true")
        assert [t.name for t in header.tensors] == [t.name for t in whole_model.tensors]
        assert header.file_size == sum(map(len, files.values()))
        del files["/a/m-00002-of-00002.gguf"]
        with pytest.raises(GGUFParseError, match=r"m-00002-of-00002.gguf: there is no such file"):
            read_header(f"{server.address}/a/m-00001-of-00002.gguf")


def test_an_unchanged_file_is_read_from_the_summary(tmp_path: Path) -> None:
    with FileServer({"/m.gguf": LARGE}) as server:
        url = f"{server.address}/m.gguf"
        first = read_header(url, cache=tmp_path)
        server.requests.clear()
        assert read_header(url, cache=tmp_path) == first
        assert [r["Range"] for r in server.requests] == ["bytes=0-0"]

        server.behaviour = functools.partial(ranges, etag='"v2"')
        server.files["/m.gguf"] = SMALL
        assert same_but_for_its_source(read_header(url, cache=tmp_path), SMALL)


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"format": 1', '{"format": 1, "identity": 3}'])
def test_a_broken_summary_is_a_miss(tmp_path: Path, broken: str) -> None:
    with FileServer({"/m.gguf": SMALL}) as server:
        url = f"{server.address}/m.gguf"
        first = read_header(url, cache=tmp_path)
        (summary,) = tmp_path.glob("*.json")
        summary.write_text(broken)
        assert read_header(url, cache=tmp_path) == first


def test_a_file_without_a_version_is_not_kept(tmp_path: Path) -> None:
    with FileServer({"/m.gguf": SMALL}, functools.partial(ranges, etag=None)) as server:
        read_header(f"{server.address}/m.gguf", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_options_of_an_address_are_refused_for_a_path(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="timeout: only for an address"):
        read_header(tmp_path, timeout=3)
