"""Models on the hub: found, described before a byte of weights, downloaded, checked, resumed."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from support.fake_hub import COMMIT, FakeHub
from support.model_stores import CONFIG, gguf, gguf_part, isolate, safetensors, sha256
from support.pipelines import write_pipeline

from nbinfer import session
from nbinfer.contract.errors import DoesNotFit, ModelLoadError, ModelNotFound
from nbinfer.contract.modes import Mode
from nbinfer.models import discover, hub, peek, pull, resolve
from nbinfer.models.hub import RemoteModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.file_server import Request

FILES = {
    "README.md": b"# text",
    "m-Q4_K_M.gguf": gguf("four"),
    "m-Q8_0.gguf": gguf("eight"),
    "mmproj-m-F16.gguf": gguf("eyes"),
    "mmproj-m-F32.gguf": gguf("large eyes"),
    "big/m-F16-00001-of-00002.gguf": gguf_part(1, 2),
    "big/m-F16-00002-of-00002.gguf": gguf_part(2, 2),
}
PARTS = ["big/m-F16-00001-of-00002.gguf", "big/m-F16-00002-of-00002.gguf"]
SMALL = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
INDEX = json.dumps({"weight_map": {"t": "model-1.safetensors"}}).encode()
WHOLE = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-1.safetensors": safetensors(),
    "consolidated.safetensors": safetensors(),
    "pytorch_model.bin": b"pickle",
    "original/params.json": b"{}",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return isolate(monkeypatch, tmp_path / "home")


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({"o/m-GGUF": dict(FILES), "o/whole": dict(WHOLE), "o/text": {"README.md": b""}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


@pytest.mark.parametrize(
    ("ref", "files"),
    [
        ("hf:o/m-GGUF", ["m-Q4_K_M.gguf", "mmproj-m-F16.gguf"]),
        ("hf:o/m-GGUF:Q8_0", ["m-Q8_0.gguf", "mmproj-m-F16.gguf"]),
        ("hf:o/m-GGUF:f16", [*PARTS, "mmproj-m-F16.gguf"]),
        ("hf:o/m-GGUF/big/m-F16-00002-of-00002.gguf", [*PARTS, "mmproj-m-F16.gguf"]),
        ("hf:o/whole", ["model-1.safetensors", *SMALL]),
        (f"hf:o/m-GGUF@{COMMIT}:Q8_0", ["m-Q8_0.gguf", "mmproj-m-F16.gguf"]),
    ],
)
def test_what_would_be_downloaded_is_known_before_it_is(server: FakeHub, ref: str, files: list[str]) -> None:
    model = peek(ref)
    assert isinstance(model, RemoteModel)
    assert [file.name for file in model.files] == files
    repo = WHOLE if "whole" in ref else FILES
    assert model.n_bytes == sum(len(repo[name]) for name in files)
    assert model.header.architecture in ("llama", "LlamaForCausalLM")
    assert discover("huggingface") == []


def test_a_download_lands_in_the_hubs_cache_and_is_found_there(server: FakeHub, home: Path) -> None:
    model = pull("hf:o/m-GGUF:Q8_0")
    assert model.path.read_bytes() == FILES["m-Q8_0.gguf"]
    assert model.projector is not None
    assert model.projector.read_bytes() == FILES["mmproj-m-F16.gguf"]
    assert model.digest == sha256(FILES["m-Q8_0.gguf"])
    assert model.path.is_relative_to(
        home / ".cache" / "huggingface" / "hub" / "models--o--m-GGUF" / "snapshots"
    )
    assert [m.ref for m in discover("huggingface")] == ["hf:o/m-GGUF:Q8_0"]
    server.requests.clear()
    assert resolve("hf:o/m-GGUF:Q8_0").path == model.path
    assert server.requests == []  # what is here is used without asking


def test_split_and_safetensors_models_are_downloaded_whole(server: FakeHub) -> None:
    split = pull("hf:o/m-GGUF:F16")
    assert [path.name for path in split.paths] == ["m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf"]
    whole = pull("hf:o/whole")
    assert whole.format == "safetensors"
    assert sorted(path.name for path in whole.path.iterdir()) == sorted(["model-1.safetensors", *SMALL])


def test_an_image_pipeline_is_downloaded_as_data_in_one_variant(server: FakeHub, tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "made")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    others = {
        "unet/diffusion_pytorch_model.fp16.safetensors": safetensors(),
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "unet/own.py": b"raise SystemExit",
        "sd-v1.safetensors": safetensors(),
        "README.md": b"# pictures",
    }
    server.repos["o/pictures"] = {**files, **others}
    remote = peek("hf:o/pictures")
    assert isinstance(remote, RemoteModel)
    assert remote.header.modes == (Mode.IMAGE_GENERATION,)
    assert remote.header.parameters == 1800
    found = pull("hf:o/pictures")
    assert found.format == "diffusers"
    there = [path.relative_to(found.path).as_posix() for path in found.path.rglob("*.*")]
    assert sorted(there) == sorted(files)
    (listed,) = discover("huggingface")
    assert (listed.ref, listed.trouble) == ("hf:o/pictures", None)


def test_the_question_comes_before_the_first_byte_of_weights(server: FakeHub) -> None:
    asked: list[RemoteModel] = []

    def refuse(model: RemoteModel) -> None:
        asked.append(model)
        raise DoesNotFit(f"{model.name} needs {model.n_bytes:,} bytes.")

    with pytest.raises(DoesNotFit, match="m-GGUF:Q8_0 needs"):
        resolve("hf:o/m-GGUF:Q8_0", confirm=refuse)
    assert [model.ref for model in asked] == ["hf:o/m-GGUF:Q8_0"]
    assert server.weight_requests == []
    assert asked[0].header.context_length == 512
    assert asked[0].free_disk > 0


def test_a_draft_model_is_downloaded_by_a_load_alone_and_not_before_the_question(
    server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: RemoteModel) -> None:
        raise DoesNotFit(f"{model.name} needs {model.n_bytes:,} bytes.")

    monkeypatch.setattr("nbinfer.session.loading.confirm_download", refuse)
    drafted: Any = {"speculative": {"draft_model": "hf:o/m-GGUF:Q8_0"}}
    with pytest.raises(ModelNotFound, match="not on this disk"):
        session.dry_run("demo", **drafted)
    with pytest.raises(DoesNotFit, match="m-GGUF:Q8_0 needs"):
        session.load("demo", **drafted)
    assert server.weight_requests == []


def test_a_model_that_is_here_is_not_asked_about(server: FakeHub) -> None:
    pull("hf:o/m-GGUF:Q8_0")
    resolve("hf:o/m-GGUF:Q8_0", confirm=lambda _: pytest.fail("asked"))


def test_a_file_that_is_not_what_the_hub_says_is_deleted(server: FakeHub) -> None:
    server.said_sha256 = "0" * 64
    with pytest.raises(ModelLoadError, match=r"m-Q8_0.gguf is not what the hub says it is: its SHA-256 is"):
        pull("hf:o/m-GGUF:Q8_0")
    assert [m for m in discover("huggingface") if m.problem is None] == []
    server.said_sha256 = None
    assert pull("hf:o/m-GGUF:Q8_0").path.read_bytes() == FILES["m-Q8_0.gguf"]


def test_a_broken_download_goes_on_where_it_stopped(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FILES["m-Q4_K_M.gguf"]
    starts: list[int] = []

    def breaks_once(request: Request, body: bytes, headers: dict[str, Any]) -> None:
        wanted = re.match(r"bytes=(\d+)-", request.handler.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        if body == data:
            starts.append(first)
        if body == data and len(starts) == 1:
            request.send(200, body[:1000], Content_Length=len(body), **headers)
            request.drop()
        elif first:
            said = f"bytes {first}-{len(body) - 1}/{len(body)}"
            request.send(206, body[first:], Content_Range=said, **headers)
        else:
            request.send(200, body, **headers)

    server.serve = breaks_once
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    assert pull("hf:o/m-GGUF").path.read_bytes() == data
    assert starts == [0, 1000]


def test_there_must_be_room_before_it_begins(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "free_disk", lambda _: 1000)
    with pytest.raises(ModelLoadError, match=r"takes 0.0 GB on disk; .* has 0.0 GB left.\nMake room"):
        pull("hf:o/m-GGUF")
    assert server.weight_requests == []


@pytest.mark.parametrize(
    ("ref", "problem"),
    [
        ("hf:o/m-GGUF:Q2_K", "hf:o/m-GGUF has no Q2_K. It has: F16, Q4_K_M, Q8_0."),
        (
            "hf:o/m-GGUF/m-Q4.gguf",
            "hf:o/m-GGUF has no file m-Q4.gguf.\nThe nearest names are m-Q4_K_M.gguf, m-Q8_0.gguf",
        ),
        ("hf:o/nothing", "there is no model o/nothing on Hugging Face, or it is private"),
        (
            "hf:o/text",
            "hf:o/text holds no GGUF files, no config.json with safetensors files and no image pipeline",
        ),
        ("hf:o/m-GGUF@v9", "o/m-GGUF has no revision v9"),
        ("hf:o", "hf:o is no reference to a model on Hugging Face"),
        ("hf:../../etc", "hf:../../etc is no reference to a model on Hugging Face"),
        ("hf:o/m/../../x.gguf", "is no reference to a model on Hugging Face"),
    ],
)
def test_what_the_hub_does_not_have_is_said_with_what_it_has(server: FakeHub, ref: str, problem: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(ref)
    assert problem in str(caught.value)


def test_no_access_says_how_to_get_it(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gated = True
    with pytest.raises(
        ModelNotFound, match=r"hf:o/m-GGUF is gated: accept its terms at https://huggingface.co/o/m-GGUF"
    ):
        resolve("hf:o/m-GGUF")
    server.gated = False
    server.token = "hf_secret"  # noqa: S105 - of the test's own server
    with pytest.raises(ModelNotFound, match="or it is private"):
        resolve("hf:o/m-GGUF")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    model = peek("hf:o/m-GGUF")
    assert isinstance(model, RemoteModel)
    assert model.header.context_length == 512
    assert "secret" not in repr(model)
    assert resolve("hf:o/m-GGUF").path.is_file()


def test_offline_the_hub_is_not_asked(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE forbids to look on the hub"):
        resolve("hf:o/m-GGUF")
    assert server.requests == []


def test_without_a_network_it_is_said_in_two_lines(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        ModelNotFound, match="hf:o/m is not on this disk, and Hugging Face does not answer: "
    ) as caught:
        resolve("hf:o/m")
    assert str(caught.value).count("\n") == 0


def test_nothing_is_downloaded_unless_wanted(server: FakeHub) -> None:
    with pytest.raises(ModelNotFound, match="Download it with: %nbinfer pull hf:o/m-GGUF"):
        resolve("hf:o/m-GGUF", download=False)
    assert server.requests == []
