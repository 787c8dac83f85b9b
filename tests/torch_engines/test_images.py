"""The image engine on a whole small pipeline: real classes, real files, real PNGs."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import runpy
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nbinfer import session
from nbinfer.contract.errors import (
    ConfigError,
    EngineClosed,
    ModelLoadError,
    NotSupported,
    RequestError,
    SafetensorsParseError,
)
from nbinfer.contract.requests import CompletionRequest, ImageRequest
from nbinfer.contract.results import Finished, ImageDone, ImageProgress, ImageResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.session import Model

pytestmark = pytest.mark.images
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "image_memory.py"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nbinfer.models.demo_image import make_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_pipeline(folder)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from nbinfer.frames.journal import close_all

    monkeypatch.setenv("NBINFER_CACHE", str(tmp_path / "cache"))
    yield
    close_all()


@pytest.fixture(scope="module")
def model(pipeline: Path) -> Iterator[Model]:
    made = session.load(str(pipeline), name="tiny", threads=1)
    yield made
    made.unload()


def pixels(image: Any) -> Any:
    return np.asarray(image.pil.convert("RGB"), np.int16)


# -- what comes out -----------------------------------------------------------------------------------------


def test_an_image_is_a_png_of_the_size_asked_for_that_says_how_it_was_made(model: Model) -> None:
    from PIL import Image

    result = model.generate_image(
        "a red fish", size="48x64", steps=3, guidance=4, seed=5, negative_prompt="x"
    )
    (made,) = result.images
    opened = Image.open(io.BytesIO(made.png))
    assert (opened.format, opened.size, made.width, made.height) == ("PNG", (48, 64), 48, 64)
    assert json.loads(opened.text["nbinfer"]) == {  # type: ignore[attr-defined]
        "prompt": "a red fish",
        "negative_prompt": "x",
        "seed": 5,
        "steps": 3,
        "guidance": 4.0,
        "size": "48x64",
        "scheduler": "DDIMScheduler",
        "model": "tiny",
    }
    assert opened.text["parameters"].splitlines() == [  # type: ignore[attr-defined]
        "a red fish",
        "Negative prompt: x",
        "Steps: 3, Sampler: DDIMScheduler, CFG scale: 4.0, Seed: 5, Size: 48x64, Model: tiny",
    ]
    assert result.finish_reason == "stop"
    assert pixels(made).std() > 5, "it is a picture, and not one colour"


def test_the_same_seed_gives_the_same_image_alone_and_among_others(model: Model) -> None:
    several = model.generate_image("a red fish", n=3, steps=2, seed=7)
    assert [image.seed for image in several] == [7, 8, 9]
    alone = model.generate_image("a red fish", steps=2, seed=8)
    assert alone[0].png == several[1].png
    assert len({image.png for image in several}) == 3


@pytest.mark.parametrize(
    "changed",
    [{"prompt": "a blue house"}, {"seed": 2}, {"steps": 3}, {"guidance": 1.0}, {"negative_prompt": "fish"}],
    ids=str,
)
def test_every_setting_shapes_the_image(model: Model, changed: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"prompt": "a red fish", "seed": 1, "steps": 2, "guidance": 7.5}
    first = model.generate_image(**usual)
    other = model.generate_image(**{**usual, **changed})
    assert np.abs(pixels(first[0]) - pixels(other[0])).max() > 0


def test_a_seed_that_is_drawn_is_recorded_and_gives_the_image_again(model: Model) -> None:
    drawn = model.generate_image("x", steps=1)
    assert model.generate_image("x", steps=1, seed=drawn[0].seed)[0].png == drawn[0].png
    assert drawn.params["seed"] == drawn[0].seed


def test_images_at_once_are_those_that_come_one_by_one(pipeline: Path, model: Model) -> None:
    with session.load(str(pipeline), name="batched", batch=2) as batched:
        found = batched.generate_image("a red fish", n=3, steps=2, seed=7)
    expected = model.generate_image("a red fish", n=3, steps=2, seed=7)
    for one, other in zip(found, expected, strict=True):
        # Sums are added in another order, which may move a last bit.
        assert np.abs(pixels(one) - pixels(other)).max() <= 2


def test_steps_are_told_with_pictures_where_they_were_asked_for(model: Model) -> None:
    events = list(model.images("x", n=2, steps=4, previews=1))
    steps = [event for event in events if isinstance(event, ImageProgress)]
    assert [(event.index, event.step) for event in steps] == [(i, s) for i in (0, 1) for s in (1, 2, 3, 4)]
    assert [event.preview is not None for event in steps] == [False, True, False, False] * 2
    assert all(event.preview is None or event.preview.startswith(b"\x89PNG") for event in steps)
    assert [event.index for event in events if isinstance(event, ImageDone)] == [0, 1]
    assert isinstance(events[-1], Finished)


def test_images_are_awaited_and_the_last_event_brings_the_result(model: Model) -> None:
    stream = model.images("x", steps=1, seed=1)

    async def read() -> list[object]:
        return [event async for event in stream]

    last = asyncio.run(read())[-1]
    assert isinstance(last, Finished)
    assert last.result is stream.result()
    assert stream.result().model == model.name


def test_a_stop_between_two_steps_keeps_the_finished_images(model: Model) -> None:
    stream = model.images("x", n=50, steps=20, seed=1)
    for event in stream:
        if isinstance(event, ImageProgress) and (event.index, event.step) == (2, 3):
            stream.cancel()
    result = stream.result()
    assert result.finish_reason == "interrupted"
    assert [image.seed for image in result] == [1, 2]
    assert result[0].png == model.generate_image("x", steps=20, seed=1)[0].png


def test_one_that_is_unloaded_ends_its_requests(pipeline: Path) -> None:
    closing = session.load(str(pipeline), name="closing")
    stream = closing.submit(ImageRequest(prompt="x", n=100, steps=50))
    waiting = closing.submit(ImageRequest(prompt="y"))
    assert isinstance(stream.next_event(30), ImageProgress)
    closing.unload()
    for each in (stream, waiting):
        with pytest.raises(EngineClosed):
            each.result(10)
    with pytest.raises(EngineClosed):
        closing.submit(ImageRequest(prompt="z"))


def test_this_process_is_left_as_it_was(pipeline: Path) -> None:
    import torch

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    loggers = {name: logging.getLogger(name).level for name in ("diffusers", "transformers")}
    with session.load(str(pipeline), name="polite") as made:
        made.generate_image("x", steps=1, seed=1)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert {name: logging.getLogger(name).level for name in loggers} == loggers


def test_a_dduf_file_gives_the_images_of_its_folder(pipeline: Path, model: Model, tmp_path: Path) -> None:
    from huggingface_hub import export_folder_as_dduf

    file = tmp_path / "tiny.dduf"
    export_folder_as_dduf(file, pipeline)
    for _ in range(2):  # unpacked, then found unpacked
        with session.load(str(file), name="packed") as packed:
            assert packed.info.effective["pipeline"] == "StableDiffusionPipeline"
            found = packed.generate_image("a red fish", steps=2, seed=1)
    assert found[0].png == model.generate_image("a red fish", steps=2, seed=1)[0].png
    assert len(list((tmp_path / "cache" / "dduf").glob("[0-9a-f]*[0-9a-f]"))) == 1


# -- what is refused ----------------------------------------------------------------------------------------


def broken(pipeline: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "broken")


def test_pickles_are_never_loaded(pipeline: Path, tmp_path: Path) -> None:
    folder = broken(pipeline, tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(SafetensorsParseError, match="pickles"):
        session.load(str(folder))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"_class_name": ["pipeline", "Evil"]}, SafetensorsParseError, "never run"),
        ({"_class_name": "NoSuchPipeline"}, NotSupported, "never run"),
        ({"_class_name": "DDPMPipeline"}, NotSupported, "from text"),
        ({"_class_name": "StableDiffusionImg2ImgPipeline"}, NotSupported, "from text"),
        ({"unet": ["my_unet", "Unet"]}, NotSupported, "my_unet"),
        ({"unet": ["os.path", "Unet"]}, SafetensorsParseError, "no class"),
        ({"unet": ["subprocess", "Popen"]}, NotSupported, "subprocess"),
    ],
    ids=str,
)
def test_a_class_that_diffusers_does_not_have_is_never_run(
    pipeline: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    folder = broken(pipeline, tmp_path)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(error, match=words):
        session.load(str(folder))


@pytest.mark.parametrize("name", ["unet/other.py", "unet/diffusers.py", "diffusers.py"])
def test_code_that_a_model_brings_is_never_run(pipeline: Path, tmp_path: Path, name: str) -> None:
    folder = broken(pipeline, tmp_path)
    marker = tmp_path / "ran"
    (folder / name).write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(SafetensorsParseError, match=r"brings code of its own.*never run"):
        session.load(str(folder))
    assert not marker.exists()


def test_a_component_that_asks_for_code_of_its_own_is_refused(pipeline: Path, tmp_path: Path) -> None:
    folder = broken(pipeline, tmp_path)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "other.Evil"}}))
    with pytest.raises(SafetensorsParseError, match=r"brings code of its own.*never run"):
        session.load(str(folder))


def test_damaged_weights_are_a_load_error_or_one_of_the_header(pipeline: Path, tmp_path: Path) -> None:
    folder = broken(pipeline, tmp_path)
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        session.load(str(folder))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(SafetensorsParseError, match="cut off"):
        session.load(str(folder))


def test_requests_that_cannot_be_run_are_refused_with_the_reason(model: Model) -> None:
    with pytest.raises(NotSupported, match="image-generation"):
        model.submit(CompletionRequest(prompt="x"))
    with pytest.raises(RequestError, match="Did you mean steps"):
        model.generate_image("x", step=3)
    with pytest.raises(NotSupported, match="makes images"):
        session.load(str(model.path), mode="completion", name="text")
    with pytest.raises(ConfigError, match="takes no context_size"):
        session.load(str(model.path), context_size=100, name="sized")
    with pytest.raises(ConfigError, match="device"):
        session.load(str(model.path), device="tpu", name="elsewhere")
    with pytest.raises(NotSupported, match="NVIDIA"):
        session.load(str(model.path), device="cuda:63", name="elsewhere")


# -- memory -------------------------------------------------------------------------------------------------


def test_the_weights_held_are_those_that_were_estimated(model: Model) -> None:
    held = model.measured_memory()
    assert held is not None
    ram = model.memory.ram
    assert held["RAM"]["unet"] == ram.denoiser
    assert held["RAM"]["vae"] == pytest.approx(ram.vae, rel=0.01)
    # CLIP's positions are a buffer, which its file does not hold.
    assert held["RAM"]["text_encoder"] == pytest.approx(ram.text_encoders, rel=0.02)


@pytest.mark.parametrize("size", ["256x256", "128x512"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tensors_of_each_stage_are_those_that_were_estimated(
    pipeline: Path, size: str, batch: int
) -> None:
    measured_stages = runpy.run_path(str(BENCHMARK))["measured_stages"]
    from nbinfer.gguf.pipeline import read_pipeline
    from nbinfer.memory.images import stage_bytes

    width, height = map(int, size.split("x"))
    expected = stage_bytes(read_pipeline(pipeline), (width, height), batch=batch)
    found = measured_stages(pipeline, (width, height), batch=batch)
    for stage in ("step", "decode"):
        assert found[stage] == pytest.approx(expected[stage], rel=0.15), stage


# -- in a frame ---------------------------------------------------------------------------------------------


def test_a_frame_gets_images_whose_seeds_give_them_again(model: Model) -> None:
    import pandas as pd

    import nbinfer as nb

    rows = pd.DataFrame({"animal": ["fish", None, "fish"]}, index=[7, 8, 9])
    found = nb.generate_images(rows, "a red {animal}", model=model, steps=2)
    assert list(found.index) == [7, 8, 9]
    assert list(found.columns) == ["animal", "image", "seed", "error", "seconds", "source"]
    first, none, second = found["image"]
    assert none is None
    assert first.text["parameters"].startswith("a red fish\n")
    assert np.any(np.asarray(first) != np.asarray(second)), "equal rows have an image each"
    again = model.generate_image("a red fish", steps=2, seed=int(found["seed"].iloc[0]))
    assert np.array_equal(np.asarray(again.image), np.asarray(first))
    assert list(nb.generate_images(rows, "a red {animal}", model=model, steps=2)["source"].dropna()) == [
        "cache",
        "cache",
    ]


def test_other_settings_are_another_question(model: Model) -> None:
    import nbinfer as nb

    def source(**options: Any) -> str:
        return str(nb.generate_images(["x"], model=model, **{"steps": 1, **options})["source"].iloc[0])

    assert source() == "run"
    assert [source(), source(size="64x64"), source(guidance=7.5)] == ["cache"] * 3
    changes: list[dict[str, Any]] = [{"steps": 2}, {"size": "72x64"}, {"seed": 1}, {"negative_prompt": "y"}]
    assert [source(**each) for each in changes] == ["run"] * 4
    assert [source(seed=None), source(seed=None), source(cache=False)] == ["run"] * 3


def test_several_images_a_row_have_seeds_and_samples(model: Model) -> None:
    import nbinfer as nb

    found = nb.generate_images(["x", "y"], model=model, steps=1, n=2)
    assert list(found["sample"]) == [0, 1, 0, 1]
    assert found["seed"].nunique() == 4


def test_an_image_whose_file_is_gone_or_changed_is_made_again(model: Model, tmp_path: Path) -> None:
    import nbinfer as nb

    def run() -> list[str]:
        return list(nb.generate_images(["x", "y", "z"], model=model, steps=1)["source"])

    assert run() == ["run"] * 3
    files = sorted((tmp_path / "cache" / "results" / "images").glob("??/*.png"))
    assert len(files) == 3
    files[0].unlink()
    files[1].write_bytes(files[2].read_bytes())
    assert sorted(run()) == ["cache", "run", "run"]
    assert run() == ["cache"] * 3
    assert nb.cache.info().images == 3
    nb.cache.clear()
    assert nb.cache.info().images == 0
    assert run() == ["run"] * 3


def test_the_images_of_the_journal_keep_to_their_limit(tmp_path: Path) -> None:
    from nbinfer.frames.pictures import Pictures

    store = Pictures(tmp_path / "images", limit=100 * 1000)
    digests = []
    for number in range(192):
        digests.append(store.put(number.to_bytes(2) * 500))
        os.utime(store.path(digests[-1]), (number, number))
    count, size = store.held()
    assert size <= 100 * 1000 + 64 * 1000
    assert store.path(digests[-1]).is_file()
    assert not store.path(digests[0]).is_file()
    assert count < 192


def test_a_frame_shows_thumbnails_and_escapes_everything_else(model: Model) -> None:
    import pandas as pd

    import nbinfer as nb

    rows = pd.DataFrame({"<b>animal</b>": ["<script>alert(1)</script>", None]})
    found = nb.generate_images(rows, on="<b>animal</b>", model=model, steps=1)
    data, _ = found.head(2)._repr_mimebundle_()
    assert data["text/html"].count("<img src=") == 1
    assert "<script>" not in data["text/html"]
    assert "<b>" not in data["text/html"]
    assert "&lt;script&gt;" in data["text/html"]
    many = pd.concat([found.iloc[:1]] * 100)
    assert type(many) is type(found)
    assert many._repr_mimebundle_()[0]["text/html"].count("<img src=") == pd.get_option("display.min_rows")


def test_images_are_saved_with_their_words_and_shown_in_a_gallery(model: Model, tmp_path: Path) -> None:
    from PIL import Image

    import nbinfer as nb

    found = nb.generate_images(["a red fish", None, "a ship"], model=model, steps=1)
    files = nb.save_images(found, tmp_path / "out", names=["one", "none", "../../two"])
    assert [file.name for file in files] == ["one.png", "_.._two.png"]
    assert all(file.parent == tmp_path / "out" for file in files)
    with Image.open(files[1]) as opened:
        assert json.loads(opened.text["nbinfer"])["prompt"] == "a ship"  # type: ignore[attr-defined]
    gallery = nb.gallery(found)
    assert len(gallery) == 2
    html = gallery._repr_html_()
    assert html.count("<img ") == 2
    assert f"a ship · seed {found['seed'].iloc[2]}" in html
    assert nb.gallery(files[0].read_bytes())._repr_html_().count("<img ") == 1
    with pytest.raises(RequestError, match="no images"):
        nb.gallery([1, 2])


# -- served -------------------------------------------------------------------------------------------------


@pytest.fixture
def client(model: Model) -> Any:
    from starlette.testclient import TestClient

    from nbinfer.sidecar.app import Served, make_app

    return TestClient(make_app(Served(("tiny", "alias"), engine=model.engine)))


def test_health_answers_while_an_image_is_made(client: Any, model: Model) -> None:
    stream = model.submit(ImageRequest(prompt="x", n=100, steps=100))
    assert isinstance(stream.next_event(30), ImageProgress)
    assert client.get("/health").json() == {"status": "ok"}
    assert not stream.done
    stream.cancel()
    result = stream.result(30)
    assert isinstance(result, ImageResult)
    assert result.finish_reason == "interrupted"
    assert "nbinfer_generated_images_total" in client.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other"}, 421, "serves 'tiny'"),
        ({"response_format": "url"}, 400, "b64_json"),
        ({"output_format": "webp"}, 400, "png"),
        ({"size": "large"}, 400, "WIDTHxHEIGHT"),
        ({"size": "65x64"}, 400, "multiple of 8"),
        ({"n": 0}, 400, "between 1 and 128"),
        ({"steps": 0}, 400, "steps"),
        ({"prompt": None}, 400, "prompt"),
    ],
    ids=str,
)
def test_what_the_route_refuses_it_refuses_with_the_reason(
    client: Any, body: dict[str, Any], status: int, words: str
) -> None:
    asked = {"model": "tiny", "prompt": "x", "steps": 1, **body}
    answer = client.post("/v1/images/generations", json=asked)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (status, True), answer.text


def test_a_text_route_says_that_this_model_makes_images(client: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert answer.status_code == 400
    assert "image-generation" in answer.json()["error"]["message"]


def test_an_image_model_loads_once_for_two_threads(pipeline: Path) -> None:
    found: list[Model] = []
    threads = [
        threading.Thread(target=lambda: found.append(session.load(str(pipeline), name="twice")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]
    found[0].unload()
