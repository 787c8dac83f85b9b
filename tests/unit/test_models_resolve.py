"""References: what each form means, and what is said when it means nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.model_stores import CONFIG, gguf, gguf_part, isolate, safetensors, write

from nbinfer.contract.errors import ModelNotFound
from nbinfer.models import resolve
from nbinfer.models.files import gguf_models, stem_and_quant
from nbinfer.models.refs import HubRef, choose, hub_ref, hub_ref_of_address

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(home)
    return home


# -- paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["relative", "absolute", "home", "Path", "folder"])
def test_a_path_in_any_form_is_the_file(home: Path, form: str) -> None:
    path = write(home / "models" / "m-Q4_0.gguf", gguf())
    forms: dict[str, str | Path] = {
        "relative": "models/m-Q4_0.gguf",
        "absolute": str(path),
        "home": "~/models/m-Q4_0.gguf",
        "Path": path,
        "folder": "models",
    }
    ref = forms[form]
    model = resolve(ref)
    assert model.path.samefile(path)
    assert (model.name, model.source, model.format, model.ref) == ("m-Q4_0", "file", "gguf", str(ref))
    assert model.header.context_length == 512


@pytest.mark.parametrize("asked", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "."])
def test_any_part_of_a_split_model_is_the_model(home: Path, asked: str) -> None:
    parts = [write(home / f"m-0000{n}-of-00002.gguf", gguf_part(n, 2)) for n in (1, 2)]
    model = resolve(home / asked)
    assert model.paths == tuple(parts)
    assert (model.path, model.name) == (parts[0], "m")


def test_a_file_without_the_suffix_is_read_by_its_content(home: Path) -> None:
    path = write(home / "blob", gguf())
    assert resolve(path).header.context_length == 512


@pytest.mark.parametrize("asked", [".", "model.safetensors"])
def test_a_safetensors_folder_is_the_model(home: Path, asked: str) -> None:
    write(home / "st" / "config.json", CONFIG)
    write(home / "st" / "model.safetensors", safetensors())
    write(home / "st" / "consolidated.safetensors", safetensors())
    model = resolve(home / "st" / asked)
    assert (model.format, model.path, model.name) == ("safetensors", home / "st", "st")
    assert [path.name for path in model.paths] == ["model.safetensors"]
    assert model.header.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("model", "projector"),
    [
        ("tiny-vision-f16.gguf", "mmproj-tiny-vision-f32.gguf"),
        ("tiny-chat-f16.gguf", None),
        ("Other-Q4_K_M.gguf", "Other-mmproj-F16.gguf"),
    ],
)
def test_among_several_models_a_projector_belongs_to_the_one_of_its_name(
    home: Path, model: str, projector: str | None
) -> None:
    names = (
        "tiny-vision-f16 tiny-chat-f16 Other-Q4_K_M mmproj-tiny-vision-f32 Other-mmproj-F16 Other-mmproj-F32"
    )
    for name in names.split():
        write(home / f"{name}.gguf", gguf(name))
    found = resolve(home / model).projector
    assert (found and found.name) == projector


@pytest.mark.parametrize(
    ("ref", "problem"),
    [
        ("./tiny.gguf", "there is no file tiny.gguf.\nIn . there is tiny-b.gguf, tiny-a.gguf."),
        ("/no/such/tiny.gguf", "there is no file /no/such/tiny.gguf: the folder /no/such does not exist."),
        ("empty/x.gguf", "there is no file empty/x.gguf."),
        (".", r". holds 2 models; name one of them: tiny-a.gguf, tiny-b.gguf."),
        ("empty", "empty holds no model: no *.gguf, no config.json with *.safetensors, no model_index.json."),
        (
            "half/m-00001-of-00003.gguf",
            "m-00001-of-00003.gguf is one of 3 files, of which m-00002-of-00003.gguf, m-",
        ),
        ("mmproj-x.gguf", "mmproj-x.gguf is the projector of a vision model: name the model itself"),
        ("shards", "shards is not whole: b.safetensors is missing."),
    ],
)
def test_a_path_that_is_no_model_says_what_is_there(home: Path, ref: str, problem: str) -> None:
    for name in ("tiny-a", "tiny-b", "mmproj-x"):
        write(home / f"{name}.gguf", gguf(name))
    (home / "empty").mkdir()
    write(home / "half" / "m-00001-of-00003.gguf", gguf_part(1, 3))
    write(home / "shards" / "config.json", CONFIG)
    write(home / "shards" / "a.safetensors", safetensors())
    write(
        home / "shards" / "model.safetensors.index.json",
        {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}},
    )
    with pytest.raises(ModelNotFound) as caught:
        resolve(ref)
    assert problem in str(caught.value)


# -- names ------------------------------------------------------------------------------------------------


def test_demo_models_need_nothing(home: Path) -> None:
    demo = resolve("demo")
    assert (demo.name, demo.source, demo.path.is_file(), demo.projector) == ("demo", "demo", True, None)
    vision = resolve("demo-vision")
    assert vision.projector is not None


def test_an_alias_stands_for_any_reference_and_may_stand_for_another_alias(home: Path) -> None:
    path = write(home / "m.gguf", gguf())
    aliases = {"mine": "same", "same": str(path), "demo": str(path)}
    assert resolve("mine", aliases=aliases).path == path
    assert resolve("mine", aliases=aliases).ref == "mine"
    assert resolve("demo", aliases=aliases).path == path  # the user's own names go first
    with pytest.raises(ModelNotFound, match="the alias 'a' leads in a circle: a -> b -> a"):
        resolve("a", aliases={"a": "b", "b": "a"})


@pytest.mark.parametrize(
    ("ref", "problem"),
    [
        ("dmeo", "there is no model 'dmeo'.\nThe nearest names are demo"),
        ("fast-mdel", "there is no model 'fast-mdel'.\nThe nearest names are fast-model."),
        ("owner/repo", "To download it from Hugging Face: hf:owner/repo"),
        ("ollama:none", "ollama has no model 'none'."),
        ("docker:none", "docker has no model 'none'."),
        ("lmstudio:none", "lmstudio has no model 'none'."),
        ("llama.cpp:none", "llama.cpp has no model 'none'."),
        ("", "the name of the model is empty"),
    ],
)
def test_an_unknown_name_lists_the_nearest_ones(home: Path, ref: str, problem: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(ref, aliases={"fast-model": "demo"})
    assert problem in str(caught.value)
    assert str(caught.value).count("\n") <= 2


# -- the parts of a reference -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("o/r", HubRef("o/r")),
        ("o/r:Q4_K_M", HubRef("o/r", quant="Q4_K_M")),
        ("o/r@v1.0:Q8_0", HubRef("o/r", quant="Q8_0", revision="v1.0")),
        ("o/r@refs/pr/3", HubRef("o/r", revision="refs/pr/3")),
        ("o/r/m.gguf", HubRef("o/r", file="m.gguf")),
        ("o/r/sub/dir/m-00001-of-00002.gguf", HubRef("o/r", file="sub/dir/m-00001-of-00002.gguf")),
        ("o/r/m.gguf@abc", HubRef("o/r", file="m.gguf", revision="abc")),
        ("o-1/R_2.gguf", HubRef("o-1/R_2.gguf")),
        ("o", None),
        ("/r", None),
        ("o/../x", None),
        ("o/r:", None),
        ("o/r@", None),
        ("o/r x", None),
        ("-o/r", None),
    ],
)
def test_a_reference_to_the_hub_is_taken_apart(text: str, expected: HubRef | None) -> None:
    if expected is None:
        with pytest.raises(ModelNotFound, match="is no reference to a model on Hugging Face"):
            hub_ref(text)
    else:
        assert hub_ref(text) == expected
        assert hub_ref(str(expected).removeprefix("hf:")) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://huggingface.co/o/r", HubRef("o/r")),
        ("https://hf.co/o/r/", HubRef("o/r")),
        ("https://huggingface.co/o/r/tree/main", HubRef("o/r")),
        ("https://huggingface.co/o/r/blob/main/a%20b.gguf", HubRef("o/r", file="a b.gguf")),
        (
            "https://huggingface.co/o/r/resolve/v1/m.gguf?download=true",
            HubRef("o/r", file="m.gguf", revision="v1"),
        ),
        ("https://huggingface.co/o/r/blob/main/README.md", HubRef("o/r")),
        ("https://huggingface.co.evil.example/o/r", None),
        ("https://example.com/o/r/resolve/main/m.gguf", None),
        ("https://huggingface.co/docs", None),
    ],
)
def test_an_address_of_the_hub_is_a_reference_to_it(url: str, expected: HubRef | None) -> None:
    assert hub_ref_of_address(url) == expected


@pytest.mark.parametrize(
    ("files", "quant", "expected"),
    [
        (["m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"], None, "m-Q4_K_M.gguf"),
        (["m-Q2_K.gguf", "m-Q8_0.gguf"], None, "m-Q8_0.gguf"),
        (["b.gguf", "a.gguf", "mmproj-a.gguf"], None, "a.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"], "ud-q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        (
            ["q/m-F16-00002-of-00002.gguf", "q/m-F16-00001-of-00002.gguf"],
            "f16",
            "q/m-F16-00001-of-00002.gguf",
        ),
        (["README.md"], None, None),
        ([], None, None),
    ],
)  # fmt: skip
def test_the_preferred_quantisation_is_taken_when_none_is_asked_for(
    files: list[str], quant: str | None, expected: str | None
) -> None:
    assert choose(files, file=None, quant=quant, where="hf:o/r") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen3-0.6B-Q4_K_M.gguf", ("Qwen3-0.6B", "Q4_K_M")),
        ("gemma-3-4b-it-IQ3_XXS.gguf", ("gemma-3-4b-it", "IQ3_XXS")),
        ("model.q8_0.gguf", ("model", "Q8_0")),
        ("tiny-chat-f16.gguf", ("tiny-chat", "F16")),
        ("gpt-oss-20b-mxfp4.gguf", ("gpt-oss-20b", "MXFP4")),
        ("Llama-BF16-00001-of-00003.gguf", ("Llama", "BF16")),
        ("DeepSeek-UD-Q2_K_XL.gguf", ("DeepSeek", "UD-Q2_K_XL")),
        ("plain.gguf", ("plain", None)),
        ("Q4_0.gguf", ("Q4_0", None)),
        ("model-v1.0.gguf", ("model-v1.0", None)),
    ],
)
def test_a_file_name_tells_the_model_and_its_quantisation(
    name: str, expected: tuple[str, str | None]
) -> None:
    assert stem_and_quant(name) == expected


def test_a_folder_that_does_not_exist_holds_no_models(tmp_path: Path) -> None:
    assert gguf_models(tmp_path / "none") == []
