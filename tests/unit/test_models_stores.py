"""Models that other programs keep: found where those put them, nothing copied, broken ones named."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.model_stores import (
    CONFIG,
    contents,
    docker,
    gguf,
    gguf_part,
    hf_repo,
    isolate,
    ollama,
    safetensors,
    sha256,
    write,
)

from nbinfer.contract.errors import ModelNotFound
from nbinfer.contract.modes import Mode
from nbinfer.models import discover, resolve

if TYPE_CHECKING:
    from pathlib import Path

    from nbinfer.models import FoundModel


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return isolate(monkeypatch, tmp_path / "home")


def refs(*sources: str) -> list[str]:
    return [model.ref for model in discover(*sources)]


def only(source: str) -> FoundModel:
    (model,) = discover(source)
    return model


# -- Hugging Face -----------------------------------------------------------------------------------------


def test_the_hugging_face_cache_is_found_with_quantisations_and_projector(home: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    files = {
        "Qwen-Q4_K_M.gguf": gguf("q4"),
        "Qwen-Q8_0.gguf": gguf("q8"),
        "mmproj-Qwen-F16.gguf": gguf("eyes"),
        "README.md": b"text",
    }
    hf_repo(hub, "Qwen/Qwen-GGUF", files)
    write(hub / "datasets--a--b" / "snapshots" / "x" / "c.gguf", gguf())
    models = discover("huggingface")
    assert [m.ref for m in models] == ["hf:Qwen/Qwen-GGUF:Q4_K_M", "hf:Qwen/Qwen-GGUF:Q8_0"]
    assert models[0].projector is not None
    assert models[0].projector.name == "mmproj-Qwen-F16.gguf"
    assert models[0].size == len(gguf("q4")) + len(gguf("eyes"))
    # The projector of both is one file.
    assert sum(m.disk_bytes for m in models) == len(gguf("q4")) + len(gguf("q8")) + len(gguf("eyes"))
    header = models[0].header
    assert header is not None
    assert (header.architecture, header.context_length, header.modes) == ("llama", 512, (Mode.COMPLETION,))


@pytest.mark.parametrize(
    ("variable", "value", "hub"),
    [
        ("HF_HUB_CACHE", "a", "a"),
        ("HUGGINGFACE_HUB_CACHE", "b", "b"),
        ("HF_HOME", "c", "c/hub"),
        ("XDG_CACHE_HOME", "d", "d/huggingface/hub"),
    ],
)
def test_the_cache_is_looked_for_where_its_variables_say(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, hub: str
) -> None:
    monkeypatch.setenv(variable, str(home / value))
    hf_repo(home / hub, "a/b", {"m.gguf": gguf()})
    assert refs("huggingface") == ["hf:a/b/m.gguf"]


@pytest.mark.parametrize(
    ("ref", "file"),
    [
        ("hf:o/r", "m-Q4_K_M.gguf"),
        ("hf:o/r:Q8_0", "m-Q8_0.gguf"),
        ("hf:o/r:q8_0", "m-Q8_0.gguf"),
        ("hf:o/r/m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("hf:o/r@main:Q8_0", "m-Q8_0.gguf"),
        ("hf:o/r@cccccccc:Q8_0", "m-Q8_0.gguf"),
        ("hf:o/r@old", "m-Q2_K.gguf"),
        ("hf:o/r:Q2_K", "m-Q2_K.gguf"),
        ("o/r:Q8_0", "m-Q8_0.gguf"),
        ("https://huggingface.co/o/r", "m-Q4_K_M.gguf"),
        ("https://huggingface.co/o/r/blob/main/m-Q8_0.gguf", "m-Q8_0.gguf"),
        ("https://huggingface.co/o/r/resolve/main/m-Q8_0.gguf?download=true", "m-Q8_0.gguf"),
    ],
)
def test_a_reference_to_the_hub_finds_what_is_in_the_cache(home: Path, ref: str, file: str) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    hf_repo(hub, "o/r", {"m-Q2_K.gguf": gguf("old")}, commit="a" * 40, branch="old")
    hf_repo(hub, "o/r", {"m-Q4_K_M.gguf": gguf("4"), "m-Q8_0.gguf": gguf("8")}, commit="c" * 40)
    model = resolve(ref, download=False)
    assert model.path.name == file
    assert model.source == "huggingface"
    assert model.digest == sha256(model.path.read_bytes())


def test_revisions_that_share_a_file_list_it_once(home: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    hf_repo(hub, "o/r", {"m-Q4_0.gguf": gguf("same")}, commit="a" * 40, branch=None)
    hf_repo(hub, "o/r", {"m-Q4_0.gguf": gguf("same"), "m-Q8_0.gguf": gguf("new")}, commit="b" * 40)
    hf_repo(hub, "o/r", {"m-Q4_0.gguf": gguf("other")}, commit="d" * 40, branch="pr/1")
    assert refs("huggingface") == ["hf:o/r:Q4_0", "hf:o/r:Q8_0", "hf:o/r@pr/1:Q4_0"]


def test_split_models_and_subfolders_of_a_repository(home: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    files = {f"Q4_K_M/m-Q4_K_M-0000{n}-of-00002.gguf": gguf_part(n, 2) for n in (1, 2)}
    hf_repo(hub, "o/big", files | {"mmproj-F16.gguf": gguf("eyes")})
    model = resolve("hf:o/big:Q4_K_M", download=False)
    assert [path.name for path in model.paths] == [name.rpartition("/")[2] for name in files]
    assert model.projector is not None


def test_a_safetensors_repository_is_one_model(home: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    hf_repo(hub, "o/st", {"model.safetensors": safetensors(), "config.json": CONFIG})
    model = only("huggingface")
    assert (model.ref, model.format, model.problem) == ("hf:o/st", "safetensors", None)
    assert model.header is not None
    assert model.header.architecture == "LlamaForCausalLM"
    assert resolve("hf:o/st", download=False).path == model.path


def test_broken_entries_of_the_cache_are_named_and_not_resolved(home: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    folder = hf_repo(hub, "o/gone", {"m-Q4_0.gguf": gguf("gone")})
    (folder / "blobs" / sha256(gguf("gone"))).unlink()
    hf_repo(hub, "o/half", {"m-00001-of-00002.gguf": gguf_part(1, 2)})
    write(hub / "models--o--stopped" / "blobs" / "abc.incomplete", b"x" * 1234)
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    shards = {
        "config.json": CONFIG,
        "model-1.safetensors": safetensors(),
        "model.safetensors.index.json": index,
    }
    hf_repo(hub, "o/shards", shards)
    assert {m.name: m.problem for m in discover("huggingface")} == {
        "o/gone:Q4_0": "m-Q4_0.gguf is missing: deleted, or its download was not finished",
        "o/half/m-00001-of-00002.gguf": "m-00002-of-00002.gguf is missing: "
        "deleted, or its download was not finished",
        "o/shards": "model-2.safetensors is missing: deleted, or its download was not finished",
        "o/stopped": "its download stopped after 1,234 bytes",
    }
    for name in ("o/gone", "o/half", "o/stopped", "o/shards"):
        with pytest.raises(ModelNotFound, match="is not on this disk"):
            resolve(f"hf:{name}", download=False)


# -- Ollama -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True], ids=["manifests", "manifests-v2"])
def test_ollamas_manifests_lead_to_their_blobs(home: Path, linked: bool) -> None:
    root = home / ".ollama" / "models"
    ollama(root, "qwen3", {"model": gguf("q"), "template": b"t", "license": b"l"}, tag="0.6b", linked=linked)
    ollama(root, "llava", {"model": gguf("l"), "projector": gguf("eyes")}, linked=linked)
    ollama(root, "m", {"model": gguf("m")}, namespace="someone", linked=linked)
    ollama(root, "r", {"model": gguf("h")}, host="hf.co", namespace="o", tag="Q4_K_M", linked=linked)
    assert refs("ollama") == [
        "ollama:hf.co/o/r:Q4_K_M",
        "ollama:llava:latest",
        "ollama:qwen3:0.6b",
        "ollama:someone/m:latest",
    ]
    for ref in ("ollama:qwen3:0.6b", "qwen3:0.6b", "ollama:registry.ollama.ai/library/qwen3:0.6b"):
        assert resolve(ref).path == root / "blobs" / f"sha256-{sha256(gguf('q'))}"
    llava = resolve("ollama:llava")
    assert llava.projector == root / "blobs" / f"sha256-{sha256(gguf('eyes'))}"
    assert llava.digest == sha256(gguf("l"))
    assert (llava.name, llava.source) == ("llava:latest", "ollama")


def test_two_tags_of_one_blob_are_counted_once(home: Path) -> None:
    root = home / ".ollama" / "models"
    ollama(root, "a", {"model": gguf("same")}, tag="1")
    ollama(root, "a", {"model": gguf("same")}, tag="2")
    models = discover("ollama")
    assert [m.size for m in models] == [len(gguf("same"))] * 2
    assert [m.disk_bytes for m in models] == [len(gguf("same")), 0]


def test_of_a_list_of_manifests_the_one_that_llama_cpp_runs_is_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = home / "store"
    monkeypatch.setenv("OLLAMA_MODELS", str(root))
    path = ollama(root, "m", {"model": gguf("m")})
    child = path.read_bytes()
    write(root / "blobs" / f"sha256-{sha256(child)}", child)
    entries = [
        {"runner": "mlx", "digest": "sha256:" + "1" * 64},
        {"runner": "llamacpp", "digest": f"sha256:{sha256(child)}"},
    ]
    write(path, {"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": entries})
    assert resolve("ollama:m").digest == sha256(gguf("m"))


def test_broken_entries_of_ollama_are_named_and_not_resolved(home: Path) -> None:
    root = home / ".ollama" / "models"
    manifests = root / "manifests" / "registry.ollama.ai" / "library"
    ollama(root, "gone", {"model": gguf("gone")})
    (root / "blobs" / f"sha256-{sha256(gguf('gone'))}").unlink()
    ollama(root, "short", {"model": gguf("short")})
    write(root / "blobs" / f"sha256-{sha256(gguf('short'))}", b"GGUF")
    ollama(root, "tensors", {"tensor": b"x"})
    ollama(root, "nothing", {"license": b"x"})
    ollama(root, "lora", {"model": gguf("base"), "adapter": b"x"})
    write(manifests / "noise" / "latest", b"\xff\xfe not JSON")
    write(manifests / "deep" / "latest", "[" * 100_000)
    layer = {
        "mediaType": "application/vnd.ollama.image.model",
        "digest": "sha256:../../../../etc/passwd",
        "size": 1,
    }
    write(manifests / "escape" / "latest", {"layers": [layer]})
    write(manifests / "odd" / "latest", {"layers": [1, {"mediaType": 3}, None]})
    problems = {m.name: m.problem or "" for m in discover("ollama")}
    expected = {
        "deep:latest": "its manifest cannot be read",
        "escape:latest": "its manifest names no sound digest",
        "gone:latest": "is missing: deleted, or its download was not finished",
        "lora:latest": "it is a base model with an adapter, which only Ollama applies",
        "noise:latest": "its manifest cannot be read",
        "nothing:latest": "it has no weights",
        "odd:latest": "it has no weights",
        "short:latest": f"has 4 bytes instead of {len(gguf('short')):,}",
        "tensors:latest": "it is stored as single tensors, not as a GGUF file",
    }
    assert problems.keys() == expected.keys()
    for name, problem in expected.items():
        assert problem in problems[name]
        with pytest.raises(ModelNotFound, match="cannot be used"):
            resolve(f"ollama:{name}")


# -- LM Studio --------------------------------------------------------------------------------------------


def test_lm_studios_folders_are_publisher_and_model(home: Path) -> None:
    root = home / ".lmstudio" / "models"
    write(root / "lmstudio-community" / "Gemma-GGUF" / "gemma-Q4_K_M.gguf", gguf("4"))
    write(root / "lmstudio-community" / "Gemma-GGUF" / "gemma-Q8_0.gguf", gguf("8"))
    write(root / "lmstudio-community" / "Gemma-GGUF" / "mmproj-gemma-F16.gguf", gguf("eyes"))
    write(root / "mlx-community" / "Phi-4bit" / "config.json", CONFIG)
    write(root / "mlx-community" / "Phi-4bit" / "model.safetensors", safetensors())
    write(root / "stray.gguf", gguf())
    assert refs("lmstudio") == [
        "lmstudio:lmstudio-community/Gemma-GGUF:Q4_K_M",
        "lmstudio:lmstudio-community/Gemma-GGUF:Q8_0",
        "lmstudio:mlx-community/Phi-4bit",
    ]
    for ref in (
        "lmstudio-community/Gemma-GGUF:Q8_0",
        "gemma-gguf:q8_0",
        "lmstudio-community/Gemma-GGUF/gemma-Q8_0.gguf",
    ):
        assert resolve(f"lmstudio:{ref}").path.name == "gemma-Q8_0.gguf"
    assert resolve("lmstudio:mlx-community/Phi-4bit").format == "safetensors"
    with pytest.raises(ModelNotFound, match="lmstudio has no model 'gemma'"):
        resolve("lmstudio:gemma")


@pytest.mark.parametrize("how", ["variable", "pointer", "old", "moved"])
def test_lm_studios_home_is_found_as_its_tools_find_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    root = home / "elsewhere"
    models = root / "models"
    if how == "variable":
        monkeypatch.setenv("LMSTUDIO_HOME", str(root))
    elif how == "pointer":
        write(home / ".lmstudio-home-pointer", f"{root}\n")
    elif how == "old":
        models = home / ".cache" / "lm-studio" / "models"
    else:
        models = home / "big disk"
        write(home / ".lmstudio" / "settings.json", {"downloadsFolder": str(models)})
    write(models / "p" / "m" / "m-Q4_0.gguf", gguf())
    assert refs("lmstudio") == ["lmstudio:p/m:Q4_0"]


# -- llama.cpp --------------------------------------------------------------------------------------------


def test_llama_cpps_flat_cache_is_found_and_split_models_are_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = home / "llama"
    monkeypatch.setenv("LLAMA_CACHE", str(cache))
    write(cache / "o_Vision-GGUF_Vision-Q8_0.gguf", gguf("v"))
    write(cache / "o_Vision-GGUF_mmproj-Vision-Q8_0.gguf", gguf("eyes"))
    write(cache / "o_Vision-GGUF_Vision-Q8_0.gguf.etag", "x")
    write(cache / "o_Split_s-00001-of-00002.gguf", gguf_part(1, 2))
    write(cache / "o_Split_s-00002-of-00002.gguf", gguf_part(2, 2))
    write(cache / "o_Next_n.gguf.downloadInProgress", gguf())
    models = discover("llama.cpp")
    assert [m.name for m in models] == ["o_Split_s-00001-of-00002.gguf", "o_Vision-GGUF_Vision-Q8_0.gguf"]
    assert len(models[0].paths) == 2
    assert models[1].projector == cache / "o_Vision-GGUF_mmproj-Vision-Q8_0.gguf"
    assert resolve("llama.cpp:o_Vision-GGUF_Vision-Q8_0").path == models[1].path


# -- Docker Model Runner ----------------------------------------------------------------------------------


def test_dockers_index_leads_to_manifests_and_blobs(home: Path) -> None:
    root = home / ".docker" / "models"
    digest = docker(
        root,
        ["ai/smollm2:latest", "index.docker.io/ai/smollm2:360M"],
        [("gguf.v3", gguf("s")), ("license", b"l")],
    )
    docker(root, ["docker.io/me/vision:1"], [("gguf.v3", gguf("v")), ("mmproj", gguf("eyes"))])
    untagged = docker(root, [], [("gguf.v3", gguf("untagged"))])
    assert refs("docker") == [
        f"docker:{name}"
        for name in sorted(["ai/smollm2:360M", "ai/smollm2:latest", "me/vision:1", untagged[:12]])
    ]
    for name in ("ai/smollm2", "smollm2", "smollm2:360M", "ai/smollm2:latest", digest, digest[:12]):
        assert resolve(f"docker:{name}").path == root / "blobs" / "sha256" / sha256(gguf("s"))
    vision = resolve("docker:me/vision:1")
    assert vision.projector == root / "blobs" / "sha256" / sha256(gguf("eyes"))
    assert vision.digest == sha256(gguf("v"))


def test_dockers_split_models_are_read_from_the_unpacked_bundle(home: Path) -> None:
    root = home / ".docker" / "models"
    parts = {f"model-0000{n}-of-00002.gguf": gguf_part(n, 2) for n in (1, 2)}
    layers = [("gguf.v3", data) for data in parts.values()]
    docker(root, ["ai/packed:1"], [*layers, ("license", b"differs")])
    docker(root, ["ai/unpacked:1"], layers, bundle=parts)
    weights = {"model.safetensors": safetensors(), "config.json": CONFIG}
    docker(root, ["ai/st:1"], [("safetensors", safetensors())], bundle=weights)
    found = {m.name: m for m in discover("docker")}
    assert "run it once in Docker Model Runner" in (found["ai/packed:1"].problem or "")
    assert [p.name for p in found["ai/unpacked:1"].paths] == list(parts)
    assert found["ai/st:1"].format == "safetensors"


def test_broken_entries_of_docker_are_named(home: Path) -> None:
    root = home / ".docker" / "models"
    docker(root, ["ai/gone:1"], [("gguf.v3", gguf("gone"))])
    (root / "blobs" / "sha256" / sha256(gguf("gone"))).unlink()
    digest = docker(root, ["ai/lost:1"], [("gguf.v3", gguf("lost"))])
    (root / "manifests" / "sha256" / digest).unlink()
    problems = {m.name: m.problem or "" for m in discover("docker")}
    assert "is missing" in problems["ai/gone:1"]
    assert problems["ai/lost:1"] == "its manifest cannot be read"


@pytest.mark.parametrize(
    "index", [b"", b"null", b"[]", b'{"models": 3}', b'{"models": [3, {"id": "x"}, {"id": null}]}']
)
def test_a_broken_index_is_a_store_without_models(home: Path, index: bytes) -> None:
    write(home / ".docker" / "models" / "models.json", index)
    assert discover("docker") == []


# -- all of them ------------------------------------------------------------------------------------------


def test_an_empty_machine_has_the_demo_models_only(home: Path) -> None:
    assert {m.source for m in discover()} == {"demo"}
    assert "demo" in refs()


def fill(home: Path) -> None:
    hf_repo(home / ".cache" / "huggingface" / "hub", "o/r", {"m-Q4_0.gguf": gguf("shared")})
    ollama(home / ".ollama" / "models", "m", {"model": gguf("m")})
    docker(home / ".docker" / "models", ["ai/m:latest"], [("gguf.v3", gguf("d"))])
    target = home / ".lmstudio" / "models" / "p" / "linked" / "linked-Q4_0.gguf"
    target.parent.mkdir(parents=True)
    blob = home / ".cache" / "huggingface" / "hub" / "models--o--r" / "blobs" / sha256(gguf("shared"))
    os.link(blob, target)


def test_a_file_that_is_no_model_says_so_when_its_header_is_read(home: Path) -> None:
    path = write(home / ".lmstudio" / "models" / "p" / "m" / "m-Q4_0.gguf", gguf()[:500])
    model = only("lmstudio")
    assert (model.problem, model.header) == (None, None)
    assert (model.trouble or "").startswith(f"failed to parse GGUF: {path}: ")
    write(path, gguf())
    assert only("lmstudio").trouble is None


def test_looking_and_resolving_writes_and_copies_nothing(home: Path) -> None:
    fill(home)
    before = contents(home)
    for model in discover():
        assert model.header is not None
        if model.source != "demo":
            assert str(resolve(model.ref, download=False).path).startswith(str(home))
    assert contents(home) == before


def test_a_hard_link_between_stores_is_counted_once(home: Path) -> None:
    fill(home)
    by_source = {m.source: m for m in discover("huggingface", "lmstudio")}
    assert by_source["huggingface"].disk_bytes == len(gguf("shared"))
    assert by_source["lmstudio"].disk_bytes == 0
    assert by_source["lmstudio"].size == len(gguf("shared"))


def test_a_bare_name_finds_a_model_of_any_store_or_asks_which(home: Path) -> None:
    fill(home)
    ollama(home / ".ollama" / "models", "m", {"model": gguf("m2")}, tag="2")
    assert resolve("m:2").source == "ollama"
    assert resolve("m:latest").source == "ollama"
    assert resolve("ai/m").source == "docker"
    with pytest.raises(
        ModelNotFound, match=r"'m' is several models; name one of them: ollama:m:latest, docker:ai/m:latest"
    ):
        resolve("m")
    with pytest.raises(
        ModelNotFound, match=r"there is no model 'linked:Q4_1'.\nThe nearest names are p/linked:Q4_0"
    ):
        resolve("linked:Q4_1")


@pytest.mark.parametrize(
    "folder",
    [
        ".cache/huggingface/hub",
        ".ollama/models/manifests",
        ".lmstudio/models",
        ".docker/models",
        "nbinfer-cache",
    ],
)
def test_a_store_that_is_no_folder_is_a_store_without_models(home: Path, folder: str) -> None:
    write(home / folder, b"a file")
    assert {m.source for m in discover()} == {"demo"}
