"""Models that other programs keep on this disk, read where they lie: nothing is copied, moved or written.

Each store is read as its program documents it. An entry that is broken (a file is missing, a download was not
finished) is listed with its problem, and skipped when a reference is resolved.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbinfer.contract.errors import GGUFParseError, SafetensorsParseError
from nbinfer.models.cache import cache_dir
from nbinfer.models.files import ModelFiles, gguf_models, pipeline_model, safetensors_model, stem_and_quant
from nbinfer.models.refs import SCHEMES, listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nbinfer.gguf import Header
    from nbinfer.gguf.pipeline import PipelineHeader
    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.models.files import Format

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MAX_JSON = 4 * 1024**2


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model on this disk.

    Attributes
    ----------
    source
        ``huggingface``, ``ollama``, ``lmstudio``, ``llama.cpp``, ``docker``, ``download`` or ``demo``.
    name
        Its name in that store.
    names
        Further names by which the store's own program knows it.
    paths
        Weight files, in order.
    path
        What an engine opens: the first GGUF file, a DDUF file, or the folder of any other model.
    projector
        The image encoder of a vision model, when it is a file of its own.
    problem
        Why it cannot be used, as far as names and sizes of files tell; None for a sound one.
    disk_bytes
        Bytes of its files that no model listed before it has: the sum over a list is what is on the disk,
        hard links and shared files counted once.
    """

    source: str
    name: str
    path: Path
    paths: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    format: Format = "gguf"
    projector: Path | None = None
    problem: str | None = None
    disk_bytes: int = 0

    @property
    def ref(self) -> str:
        """The reference that means this model."""
        schemes = {source: scheme for scheme, source in SCHEMES.items()}
        return self.name if self.source == "demo" else f"{schemes[self.source]}:{self.name}"

    @property
    def files(self) -> tuple[Path, ...]:
        """All files: weights, then the projector."""
        return self.paths if self.projector is None else (*self.paths, self.projector)

    @cached_property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(_size(path) or 0 for path in self.files)

    @property
    def header(self) -> Header | SafetensorsHeader | PipelineHeader | None:
        """What its header says; None when it cannot be read, and ``trouble`` says why."""
        return self._read[0]

    @property
    def trouble(self) -> str | None:
        """Why it cannot be used: its ``problem``, or what is wrong with its header; None for a sound one."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[Header | SafetensorsHeader | PipelineHeader | None, str | None]:
        from nbinfer.gguf import read_header
        from nbinfer.gguf.pipeline import read_pipeline
        from nbinfer.gguf.safetensors import read_safetensors

        if self.problem is not None:
            return None, self.problem
        readers: dict[str, Callable[[Path], Any]] = {
            "gguf": read_header,
            "safetensors": read_safetensors,
            "diffusers": read_pipeline,
        }
        try:
            return readers[self.format](self.path), None
        except (GGUFParseError, SafetensorsParseError) as error:
            return None, str(error)


def discover(*sources: str) -> list[FoundModel]:
    """List the models on this disk.

    Parameters
    ----------
    sources
        Which stores to look into; none given: all of them.

    Returns
    -------
    list of FoundModel
        Store by store, sorted by name. A broken entry has a ``problem``. Never raises: a store that cannot be
        read is a store without models.
    """
    found: list[FoundModel] = []
    for source in sources or STORES:
        models = {model.name: model for model in STORES[source]()}
        found += sorted(models.values(), key=lambda model: model.name.lower())
    return list(_counted_once(found))


def _counted_once(models: list[FoundModel]) -> Iterator[FoundModel]:
    seen: set[tuple[int, int]] = set()
    for model in models:
        n = 0
        for path in model.files:
            try:
                status = path.stat()
            except OSError:
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                n += status.st_size
        yield replace(model, disk_bytes=n)


# -- the demo models --------------------------------------------------------------------------------------


def _demo() -> Iterator[FoundModel]:
    from nbinfer.models.demo import demo_models_on_disk

    for name, path in demo_models_on_disk().items():
        folder = pipeline_model(path) or safetensors_model(path)
        files = folder or next(files for files in gguf_models(path.parent) if files.paths[0] == path)
        yield _model("demo", name, files)


# -- Hugging Face: hub/models--OWNER--REPO/{refs,snapshots,blobs} -------------------------------------------


def hf_cache() -> Path:
    """Return the folder of the Hugging Face cache, by the variables that its library reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(variable):
            return Path(value).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _huggingface() -> Iterator[FoundModel]:
    for repo in _folders(hf_cache()):
        if repo.name.startswith("models--"):
            yield from hf_repo(repo)


def hf_repo(folder: Path) -> Iterator[FoundModel]:
    """List the models of one repository in the Hugging Face cache, its ``main`` revision first."""
    repo = folder.name.removeprefix("models--").replace("--", "/")
    seen: set[tuple[str, ...]] = set()
    for number, (snapshot, revision) in enumerate(hf_snapshots(folder)):
        # The first snapshot has the plain names; another is named by its branch, or by its commit.
        at = "" if number == 0 else f"@{revision or snapshot.name[:12]}"
        found = hf_files(snapshot)
        quants = {file: stem_and_quant(Path(file).name)[1] for file in found}
        for file, files in found.items():
            real = tuple(os.path.realpath(path) for path in files.paths)
            if real in seen:
                continue
            seen.add(real)
            exact = f"{repo}/{file}{at}" if file else f"{repo}{at}"
            quant = quants[file]
            short = f"{repo}{at}:{quant}" if quant and list(quants.values()).count(quant) == 1 else exact
            yield _model("huggingface", short, files, names=(exact,))
    unfinished = [
        _size(path) or 0 for path in _entries(folder / "blobs") if path.name.endswith(".incomplete")
    ]
    if unfinished and not seen:
        problem = f"its download stopped after {sum(unfinished):,} bytes"
        yield FoundModel(source="huggingface", name=repo, path=folder, problem=problem)


def hf_snapshots(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the snapshots of a repository in the cache, each with its branch or tag, ``main`` first."""
    refs = folder / "refs"
    names = {
        (_text(path) or "").strip(): path.relative_to(refs).as_posix()
        for path in sorted(refs.rglob("*"), key=lambda path: path.name == "main")
        if path.is_file()
    }
    snapshots = [(snapshot, names.get(snapshot.name)) for snapshot in _folders(folder / "snapshots")]
    return sorted(snapshots, key=lambda pair: (pair[1] != "main", pair[1] is None, pair[0].name))


def hf_files(snapshot: Path) -> dict[str, ModelFiles]:
    """Return the models of a snapshot by the path of their first file (safetensors: an empty path)."""
    folders = [snapshot, *sorted(path for path in snapshot.rglob("*") if path.is_dir())]
    found = {
        files.paths[0].relative_to(snapshot).as_posix(): files
        for folder in folders
        for files in _gguf_in(folder, snapshot)
    }
    if found:
        return found
    packed = [path for path in _entries(snapshot) if path.name.lower().endswith(".dduf")]
    if packed:
        return {path.name: ModelFiles("diffusers", (path,)) for path in packed}
    whole = pipeline_model(snapshot) or safetensors_model(snapshot)
    return {} if whole is None else {"": whole}


def _gguf_in(folder: Path, root: Path) -> list[ModelFiles]:
    """List the models of a folder; a projector may lie beside the folder, at the root of the repository."""
    models = gguf_models(folder)
    if folder == root:
        return models
    above = sorted(
        p.name for p in _entries(root) if p.name.lower().endswith(".gguf") and "mmproj" in p.name.lower()
    )
    if not above:
        return models
    return [files if files.projector else files._replace(projector=root / above[0]) for files in models]


# -- Ollama: manifests/HOST/NAMESPACE/MODEL/TAG -> blobs/sha256-… -------------------------------------------

_OLLAMA_TYPE = "application/vnd.ollama.image."
_OLLAMA_HOME = ("~/.ollama/models", "/usr/share/ollama/.ollama/models", "/var/lib/ollama/.ollama/models")


def _ollama() -> Iterator[FoundModel]:
    configured = os.environ.get("OLLAMA_MODELS")
    for root in [configured] if configured else _OLLAMA_HOME:
        folder = Path(root).expanduser()
        # Newer versions link named manifests to blobs under manifests-v2, and still read manifests.
        for manifests in ("manifests-v2", "manifests"):
            for path in sorted(_glob(folder / manifests, "*/*/*/*")):
                if not path.is_dir() and not path.name.startswith("."):
                    yield _ollama_model(folder, *path.relative_to(folder / manifests).parts, path=path)


def _ollama_model(root: Path, host: str, namespace: str, model: str, tag: str, *, path: Path) -> FoundModel:
    name = f"{model}:{tag}"
    if host != "registry.ollama.ai":
        name = f"{host}/{namespace}/{name}"
    elif namespace != "library":
        name = f"{namespace}/{name}"
    names = (
        f"{host}/{namespace}/{model}:{tag}",
        *((name.removesuffix(":latest"),) if tag == "latest" else ()),
    )

    def found(problem: str | None = None, files: ModelFiles | None = None) -> FoundModel:
        if problem is not None or files is None:
            return FoundModel(source="ollama", name=name, names=names, path=path, problem=problem)
        return _model("ollama", name, files, names=names)

    manifest = _ollama_manifest(root, path)
    layers = _layers(manifest, _OLLAMA_TYPE)
    if layers is None:
        return found("its manifest cannot be read")
    weights = layers.get("model", [])
    if len(weights) != 1:
        return found(
            "it is stored as single tensors, not as a GGUF file"
            if "tensor" in layers
            else "it has no weights"
        )
    if "adapter" in layers:
        return found("it is a base model with an adapter, which only Ollama applies")
    blobs = [_blob(root / "blobs", "sha256-", layer) for layer in (weights + layers.get("projector", []))[:2]]
    broken = next((problem for _, problem in blobs if problem), None)
    if broken is not None:
        return found(broken)
    projector = blobs[1][0] if len(blobs) > 1 else None
    return found(files=ModelFiles("gguf", (blobs[0][0],), projector))


def _ollama_manifest(root: Path, path: Path) -> Any:
    """Read a manifest; of a list of them, the one that llama.cpp can run."""
    manifest = _json(path)
    children = manifest.get("manifests") if isinstance(manifest, dict) else None
    if not isinstance(children, list):
        return manifest
    for runner in ("ollama", "llamacpp", ""):
        for child in children:
            if isinstance(child, dict) and str(child.get("runner", "")).lower() == runner:
                if "layers" in child:
                    return child
                digest = _DIGEST.fullmatch(str(child.get("digest")))
                return _json(root / "blobs" / f"sha256-{digest[1]}") if digest else None
    return None


# -- LM Studio: models/PUBLISHER/MODEL/… --------------------------------------------------------------------


def lmstudio_models() -> Path:
    """Return LM Studio's folder of models, as its own tools find it."""
    home = Path.home()
    if configured := os.environ.get("LMSTUDIO_HOME"):
        root = Path(configured)
    elif pointer := (_text(home / ".lmstudio-home-pointer") or "").strip():
        root = Path(pointer)
    else:
        old = home / ".cache" / "lm-studio"
        root = old if old.is_dir() else home / ".lmstudio"
    settings = _json(root / "settings.json")
    moved = settings.get("downloadsFolder") if isinstance(settings, dict) else None
    return Path(moved) if isinstance(moved, str) and moved else root / "models"


def _lmstudio() -> Iterator[FoundModel]:
    root = lmstudio_models()
    for publisher in _folders(root):
        for folder in _folders(publisher):
            name = f"{publisher.name}/{folder.name}"
            models = gguf_models(folder)
            quants = [stem_and_quant(files.paths[0].name)[1] for files in models]
            for files, quant in zip(models, quants, strict=True):
                exact = f"{name}/{files.paths[0].name}"
                short = f"{name}:{quant}" if quant and quants.count(quant) == 1 else exact
                yield _model("lmstudio", short, files, names=(exact, short.partition("/")[2]))
            if not models and (whole := safetensors_model(folder)) is not None:
                yield _model("lmstudio", name, whole, names=(folder.name,))


# -- llama.cpp: a flat folder of OWNER_REPO_FILE.gguf -------------------------------------------------------


def _llamacpp() -> Iterator[FoundModel]:
    if configured := os.environ.get("LLAMA_CACHE"):
        folder = Path(configured)
    elif sys.platform == "darwin":
        folder = Path("~/Library/Caches/llama.cpp")
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local") / "llama.cpp"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llama.cpp"
    for files in gguf_models(folder.expanduser()):
        name = files.paths[0].name
        yield _model("llama.cpp", name, files, names=(name.removesuffix(".gguf"),))


# -- Docker Model Runner: models.json -> manifests/sha256/… -> blobs/sha256/… -------------------------------

_DOCKER_TYPE = "application/vnd.docker.ai."
_DOCKER_HOSTS = ("index.docker.io/", "docker.io/")


def _docker() -> Iterator[FoundModel]:
    root = Path(os.environ.get("MODELS_PATH") or "~/.docker/models").expanduser()
    index = _json(root / "models.json")
    entries = index.get("models") if isinstance(index, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        digest = _DIGEST.fullmatch(str(entry.get("id"))) if isinstance(entry, dict) else None
        if digest is None:
            continue
        tags = [tag for tag in entry.get("tags") or () if isinstance(tag, str)]
        for tag in tags or [digest[1][:12]]:
            yield _docker_model(root, digest[1], tag)


def _docker_model(root: Path, digest: str, tag: str) -> FoundModel:
    name = tag
    for host in _DOCKER_HOSTS:
        name = name.removeprefix(host)
    without_tag = name.removesuffix(":latest")
    names = tuple(
        {tag, without_tag, without_tag.removeprefix("ai/"), name.removeprefix("ai/"), digest, digest[:12]}
    )
    layers = _layers(_json(root / "manifests" / "sha256" / digest), _DOCKER_TYPE)
    bundle = root / "bundles" / "sha256" / digest / "model"

    def found(problem: str) -> FoundModel:
        return FoundModel(source="docker", name=name, names=names, path=root, problem=problem)

    if layers is None:
        return found("its manifest cannot be read")
    weights = layers.get("gguf.v3", [])
    if len(weights) == 1:
        blobs = [
            _blob(root / "blobs" / "sha256", "", layer) for layer in (weights + layers.get("mmproj", []))[:2]
        ]
        broken = next((problem for _, problem in blobs if problem), None)
        if broken is not None:
            return found(broken)
        files = ModelFiles("gguf", (blobs[0][0],), blobs[1][0] if len(blobs) > 1 else None)
        return _model("docker", name, files, names=names)
    # Several files belong together by their names, which only the unpacked bundle has (as hard links).
    unpacked = [*gguf_models(bundle), *filter(None, [safetensors_model(bundle)])]
    if len(unpacked) == 1:
        return _model("docker", name, unpacked[0], names=names)
    kind = "several files" if weights else "files that are no GGUF"
    return found(f"it is packed as {kind}; run it once in Docker Model Runner, which unpacks it")


# -- files that nbinfer downloaded from plain addresses -----------------------------------------------------


def downloads_dir() -> Path:
    """Return the folder of files downloaded from plain addresses."""
    return cache_dir("downloads")


def _downloads() -> Iterator[FoundModel]:
    for folder in _folders(downloads_dir()):
        for files in gguf_models(folder):
            yield _model(
                "download", f"{folder.name}/{files.paths[0].name}", files, names=(files.paths[0].name,)
            )


STORES: Final[dict[str, Callable[[], Iterator[FoundModel]]]] = {
    "demo": _demo,
    "huggingface": _huggingface,
    "ollama": _ollama,
    "lmstudio": _lmstudio,
    "llama.cpp": _llamacpp,
    "docker": _docker,
    "download": _downloads,
}
"""Each store, and the function that lists it."""


# -- reading without trusting -------------------------------------------------------------------------------


def _model(source: str, name: str, files: ModelFiles, *, names: tuple[str, ...] = ()) -> FoundModel:
    missing = files.missing
    problem = f"{listed(missing)} is missing: deleted, or its download was not finished" if missing else None
    return FoundModel(
        source=source,
        name=name,
        names=tuple(other for other in names if other != name),
        path=files.path,
        paths=files.paths,
        format=files.format,
        projector=files.projector if files.projector and files.projector.is_file() else None,
        problem=problem,
    )


def _layers(manifest: Any, prefix: str) -> dict[str, list[dict[str, Any]]] | None:
    """Return the layers of a manifest by the end of their media type; None when it is no manifest."""
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(layers, list):
        return None
    table: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        if isinstance(layer, dict) and isinstance(kind := layer.get("mediaType"), str):
            table.setdefault(kind.removeprefix(prefix), []).append(layer)
    return table


def _blob(folder: Path, prefix: str, layer: dict[str, Any]) -> tuple[Path, str | None]:
    """Return the file of a layer, and what is wrong with it."""
    digest = _DIGEST.fullmatch(str(layer.get("digest")))
    if digest is None:
        return folder, "its manifest names no sound digest"
    path = folder / f"{prefix}{digest[1]}"
    size, said = _size(path), layer.get("size")
    if size is None:
        return path, f"the file {path.name[:19]}… is missing: deleted, or its download was not finished"
    if isinstance(said, int) and said != size:
        return path, f"the file {path.name[:19]}… has {size:,} bytes instead of {said:,}"
    return path, None


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(path: Path) -> str | None:
    """Return a small text file; None when it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except OSError:
        return []
