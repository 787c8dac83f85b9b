"""Stores of models laid out as the programs that own them lay them out, with small real files."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from support.gguf_bytes import STRING, U16, U32, Entry, Tensor, small_model

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

VARIABLES = (
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "OLLAMA_MODELS",
    "LMSTUDIO_HOME",
    "LLAMA_CACHE",
    "MODELS_PATH",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_TOKEN",
)


def isolate(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """Make ``home`` the home folder, so that no store of this machine is seen; return it."""
    home.mkdir(exist_ok=True)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("NBINFER_CACHE", str(home / "nbinfer-cache"))
    return home


def gguf(name: str = "a small model", **metadata: int) -> bytes:
    """A small sound GGUF file; its name makes it differ from others."""
    entries = [
        Entry("general.architecture", STRING, "llama"),
        Entry("general.name", STRING, name),
        Entry("llama.block_count", U32, 2),
        Entry("llama.context_length", U32, 512),
        *(Entry(key.replace("__", "."), U16, value) for key, value in metadata.items()),
    ]
    # Named by the model, so that parts of one hold different tensors.
    return small_model(entries=entries, tensors=[Tensor(f"{name}.weight", (64, 8))]).bytes()


def gguf_part(number: int, total: int) -> bytes:
    return gguf(f"part {number}", split__no=number - 1, split__count=total)


def safetensors() -> bytes:
    table = {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    raw = json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(8)


CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 512}).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes | str | dict[str, Any] | list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, dict | list):
        data = json.dumps(data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def hf_repo(
    hub: Path, repo: str, files: dict[str, bytes], *, commit: str = "c" * 40, branch: str | None = "main"
) -> Path:
    """Add a snapshot to the Hugging Face cache: blobs, symbolic links to them, and a ref."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    for name, data in files.items():
        blob = write(folder / "blobs" / sha256(data), data)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if branch:
        write(folder / "refs" / branch, commit)
    return folder


def ollama(
    root: Path,
    name: str,
    layers: dict[str, bytes],
    *,
    tag: str = "latest",
    host: str = "registry.ollama.ai",
    namespace: str = "library",
    linked: bool = False,
) -> Path:
    """Add a model to Ollama's store; ``linked`` as newer versions do it. Returns the manifest."""
    listed = []
    for kind, data in layers.items():
        digest = sha256(data)
        write(root / "blobs" / f"sha256-{digest}", data)
        media = f"application/vnd.ollama.image.{kind}"
        listed.append({"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)})
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": "sha256:" + "0" * 64,
        },
        "layers": listed,
    }
    path = root / ("manifests-v2" if linked else "manifests") / host / namespace / name / tag
    if not linked:
        return write(path, manifest)
    raw = json.dumps(manifest).encode()
    blob = write(root / "blobs" / f"sha256-{sha256(raw)}", raw)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


def docker(
    root: Path, tags: list[str], layers: list[tuple[str, bytes]], *, bundle: dict[str, bytes] | None = None
) -> str:
    """Add a model to Docker Model Runner's store; returns its digest."""
    listed = []
    for kind, data in layers:
        write(root / "blobs" / "sha256" / sha256(data), data)
        media = f"application/vnd.docker.ai.{kind}"
        listed.append({"mediaType": media, "digest": f"sha256:{sha256(data)}", "size": len(data)})
    raw = json.dumps({"schemaVersion": 2, "layers": listed}).encode()
    digest = sha256(raw)
    write(root / "manifests" / "sha256" / digest, raw)
    for name, data in (bundle or {}).items():
        target = root / "bundles" / "sha256" / digest / "model" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        blob = root / "blobs" / "sha256" / sha256(data)
        if blob.is_file():
            target.hardlink_to(blob)
        else:
            target.write_bytes(data)
    index = root / "models.json"
    models = json.loads(index.read_text())["models"] if index.is_file() else []
    files = [layer["digest"] for layer in listed]
    write(index, {"models": [*models, {"id": f"sha256:{digest}", "tags": tags, "files": files}]})
    write(root / "layout.json", {"version": "1.0.0"})
    return digest


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything in a folder, to see that nothing was written."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))}
