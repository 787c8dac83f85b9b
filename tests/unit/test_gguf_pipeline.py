"""Headers of image pipelines: folders and DDUF files, whole, damaged and hostile; and what they will take."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from support.pipelines import SD15, write_pipeline

import nbinfer as nb
from nbinfer.contract.errors import ConfigError, DoesNotFit, RequestError, SafetensorsParseError
from nbinfer.contract.modes import Mode
from nbinfer.gguf.pipeline import dduf_entries, read_pipeline, weight_files
from nbinfer.memory.images import ImageEstimate, estimate_images, stage_bytes
from nbinfer.models import resolve

if TYPE_CHECKING:
    from pathlib import Path


def pack(folder: Path, target: Path, **changes: bytes) -> Path:
    """Write a folder as a DDUF file, with other files in it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in changes:
                archive.write(path, name)
        for name, data in changes.items():
            archive.writestr(name, data)
    return target


def test_a_folder_and_its_dduf_file_say_the_same(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    file = pack(folder, tmp_path / "tiny.dduf")
    for header in (read_pipeline(folder), read_pipeline(file)):
        assert header.architecture == "StableDiffusionPipeline"
        assert header.modes == (Mode.IMAGE_GENERATION,)
        assert [part.name for part in header.text_encoders] == ["text_encoder"]
        assert header.denoiser is not None
        assert header.denoiser.weights_bytes == 4 * 1000
        assert header.parameters == 1000 + 600 + 200
        assert header.weights_bytes == 4 * 1000 + 2 * 600 + 4 * 200
        assert str(header.quantisation) == "F32"
        assert header.image_size == (64, 64)
        assert header.vae_scale == 8
    for ref in (folder, file):
        found = resolve(ref)
        assert (found.format, found.path, found.name) == ("diffusers", ref, "tiny")
        assert len(found.digest) == 64
    assert resolve(folder).digest != resolve(file).digest


def test_the_digest_covers_what_shapes_an_image_beside_the_weights(tmp_path: Path) -> None:
    one, other = write_pipeline(tmp_path / "one"), write_pipeline(tmp_path / "other")
    assert resolve(one).digest == resolve(other).digest
    (other / "scheduler" / "scheduler_config.json").write_text('{"steps_offset": 0}')
    assert resolve(one).digest != resolve(other).digest


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a/model.fp16.safetensors", "a/model.safetensors"], (["a/model.safetensors"], "")),
        (["a/model.fp16.safetensors"], (["a/model.fp16.safetensors"], "fp16")),
        (
            ["a/m-00001-of-00002.safetensors", "a/m-00002-of-00002.safetensors", "a/m.fp16.safetensors"],
            (["a/m-00001-of-00002.safetensors", "a/m-00002-of-00002.safetensors"], ""),
        ),
        (["a/model.bin", "a/config.json"], ([], "")),
    ],
)
def test_one_variant_of_the_weights_is_taken(names: list[str], chosen: tuple[list[str], str]) -> None:
    assert weight_files(names) == chosen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_index.json": b"[]"}, "no object"),
        ({"model_index.json": b'{"_class_name": "a.b"}'}, "names no pipeline"),
        ({"model_index.json": b'{"_class_name": ["own", "X"]}'}, "names no pipeline"),
        ({"model_index.json": b'{"_class_name": "X", "unet": ["../x", "Y"]}'}, "no class"),
        ({"unet/diffusers.py": b""}, "code of its own"),
        ({"unet/diffusion_pytorch_model.safetensors": b"\xff" * 40}, "announced"),
        ({"unet/config.json": b"{"}, "no valid JSON"),
    ],
    ids=str,
)
def test_a_damaged_or_hostile_folder_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, bytes], words: str
) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    for name, data in change.items():
        (folder / name).write_bytes(data)
    with pytest.raises(SafetensorsParseError, match=words):
        read_pipeline(folder)


def test_weights_that_are_pickles_or_not_there_are_refused(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SafetensorsParseError, match="pickles"):
        read_pipeline(folder)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(SafetensorsParseError, match="vae has no safetensors"):
        read_pipeline(folder)


def test_a_part_of_split_weights_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    files = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": dict(zip("ab", files, strict=True))}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SafetensorsParseError, match=r"00002-of-00002\.safetensors is missing"):
        read_pipeline(folder)


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/etc/evil.json", "a/b/c.json", "unet/run.py", "..\\evil.json", "a/..json/x.json"],
)
def test_a_dduf_file_holds_data_under_plain_names_only(tmp_path: Path, name: str) -> None:
    file = pack(write_pipeline(tmp_path / "tiny"), tmp_path / "x.dduf", **{name: b"{}"})
    with pytest.raises(SafetensorsParseError, match="no place in a DDUF file"):
        read_pipeline(file)


def test_a_dduf_file_that_is_none_or_packed_otherwise_is_refused(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    file = tmp_path / "x.dduf"
    for data in (b"", b"PK\3\4", b"not a zip at all" * 100):
        file.write_bytes(data)
        with pytest.raises(SafetensorsParseError, match="no DDUF file"):
            read_pipeline(file)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "model_index.json", "model_index.json")
    with pytest.raises(SafetensorsParseError, match="compressed"):
        read_pipeline(file)


def test_every_cut_of_a_dduf_file_is_refused_and_never_read_past_its_end(tmp_path: Path) -> None:
    file = pack(write_pipeline(tmp_path / "tiny"), tmp_path / "x.dduf")
    whole = file.read_bytes()
    entries = dduf_entries(file)
    assert all(offset + size <= len(whole) for offset, size in entries.values())
    for keep in range(0, len(whole), 997):
        file.write_bytes(whole[:keep])
        with pytest.raises(SafetensorsParseError):
            read_pipeline(file)


# -- what it will take ----------------------------------------------------------------------------------


def test_the_stages_of_stable_diffusion_are_what_torch_allocates(tmp_path: Path) -> None:
    header = read_pipeline(write_pipeline(tmp_path / "sd", **SD15))
    mib = 2**20
    found = stage_bytes(header, (512, 512))
    # Counted by benchmarks/image_memory.py: 260.5 and 768.1 MiB.
    assert found["step"] / mib == pytest.approx(260.5, rel=0.01)
    assert found["decode"] / mib == pytest.approx(768.1, rel=0.01)
    assert stage_bytes(header, (512, 512), guided=False)["step"] == found["step"] / 2
    assert stage_bytes(header, (512, 512), batch=3)["decode"] == 3 * found["decode"]
    assert stage_bytes(header, (512, 512), dtype="bfloat16")["decode"] == found["decode"] / 2
    # This VAE overflows in float16 and is computed in float32.
    assert stage_bytes(header, (512, 512), dtype="float16")["decode"] == found["decode"]


def test_an_estimate_counts_weights_as_loaded_and_the_largest_stage(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    made: Any = nb.estimate(folder, gpus=[], ram="8GiB")
    assert isinstance(made, ImageEstimate)
    assert (made.ram.denoiser, made.ram.text_encoders, made.ram.vae) == (4000, 2400, 800)
    assert made.ram.activations == max(made.stages.values())
    assert made.verdict == "fits"
    assert "64x64, 1 at once, float32" in str(made)
    on_gpu = estimate_images(folder, gpus=["8GiB"], size="128x64")
    assert on_gpu.gpus[0].denoiser == 2000
    assert on_gpu.ram.known == 0
    assert on_gpu.stages["decode"] == made.stages["decode"]  # twice the pixels, half the bytes
    assert json.loads(json.dumps(on_gpu.to_dict()))["size"] == [128, 64]
    assert set(made.to_frame()["part"]) == {"text_encoders", "denoiser", "vae", "activations"}
    html = made._repr_mimebundle_()["text/html"]
    assert "denoiser" in html
    assert "VAE" in html


def test_what_does_not_fit_comes_with_what_would(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "sd", **SD15)
    made = estimate_images(folder, gpus=[], ram="2GiB", size="2048x2048", batch=4)
    assert made.verdict == "does not fit"
    advice = made.advice()
    assert advice
    for each in advice:
        assert made.again(**each.changes).verdict != "does not fit"
    assert "does not fit" in repr(made)


def test_a_runner_is_given_room_for_its_pictures_too(tmp_path: Path) -> None:
    from nbinfer.contract.config import ModelConfig
    from nbinfer.sidecar.sizes import runner_size

    folder = write_pipeline(tmp_path / "sd", **SD15)
    options = {"device": "cpu", "batch": 2}
    size = runner_size(folder, Mode.IMAGE_GENERATION, ModelConfig(), options)
    assert size == estimate_images(folder, device="cpu", batch=2).required
    assert size.ram > 1.5 * 2**30


def test_the_second_gpu_is_planned_by_its_place(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    made = estimate_images(folder, gpus=["4GiB", "8GiB"], device="cuda:1")
    assert [gpu.denoiser for gpu in made.gpus] == [0, 2000]
    assert made.required.vram[0] == 0
    assert made.verdict == "fits"


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "tiny")
    for options in ({"batch": 0}, {"dtype": "int8"}):
        with pytest.raises(ConfigError):
            estimate_images(folder, **options)
    with pytest.raises(RequestError, match="multiple of 8"):
        estimate_images(folder, size="100x100")


def test_a_load_that_does_not_fit_is_refused_before_anything_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbinfer import backends
    from nbinfer.backends.diffusers import DiffusersBackend
    from nbinfer.contract.status import BackendStatus, StatusWord

    running = BackendStatus(StatusWord.RUNNING, "as if it were installed")
    monkeypatch.setattr(DiffusersBackend, "status", lambda self: running)
    assert backends.for_format("diffusers").name == "diffusers"
    vast = {**SD15, "unet": {**SD15["unet"], "sample_size": 1024}}
    with pytest.raises(DoesNotFit, match="does not fit"):
        nb.load(write_pipeline(tmp_path / "vast", **vast))
