"""Images through the real demo vision model. Its makers promise colours, not shapes: so do these tests."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest
from support.pictures import disc

import nbinfer as nb
from nbinfer.contract.errors import ContextOverflow, EngineError, ModelLoadError, NotSupported, RequestError
from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nbinfer.contract.requests import CompletionRequest

pytestmark = pytest.mark.engine

PAIRS = [("red", "white"), ("blue", "yellow"), ("green", "black"), ("yellow", "blue"), ("white", "red")]


@pytest.fixture(scope="module")
def model() -> Iterator[nb.Model]:
    model = nb.load("demo-vision", threads=1)
    yield model
    model.unload()


@pytest.mark.parametrize(("colour", "background"), PAIRS)
def test_the_model_sees_the_colours(model: nb.Model, colour: str, background: str) -> None:
    picture = disc(colour, background)
    shape = model.infer("What color is the shape?", images=[picture])
    assert colour in shape.text
    behind = model.infer("What color is the background?", images=[picture])
    assert behind.text == f"The background is {background}."
    assert shape.usage.prompt_tokens > 20


def test_batched_answers_are_the_same_as_lone_ones(model: nb.Model) -> None:
    def ask(colour: str, background: str) -> CompletionRequest:
        return model.request(
            "What color is the background?", images=[disc(colour, background)], priority="batch"
        )

    text_only = model.request("Hello!", priority="batch", max_tokens=8)
    alone = model.submit(text_only).result(30).text
    streams = [model.submit(r) for pair in PAIRS * 3 for r in (ask(*pair), text_only)]
    texts = [stream.result(60).text for stream in streams]
    assert texts[1::2] == [alone] * 15
    assert texts[::2] == [f"The background is {background}." for _, background in PAIRS * 3]


def test_images_that_do_not_go_in_beside_others_wait_and_hold_up_nobody(
    model: nb.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = model.engine
    feed, refused = engine._projector.feed, []

    def only_alone(*given: Any) -> bool:
        if sum(slot.sequence is not None for slot in engine._slots) > 1:
            refused.append(1)
            return False
        return bool(feed(*given))

    monkeypatch.setattr(engine._projector, "feed", only_alone)
    story = model.submit(model.request("Tell me a story about a dog.", max_tokens=60))
    picture = model.submit(model.request("What color is the background?", images=[disc("red", "blue")]))
    assert story.result(60).text
    assert picture.result(60).text == "The background is blue."
    assert 1 <= len(refused) <= 2
    monkeypatch.setattr(engine._projector, "feed", lambda *_: False)
    with pytest.raises(EngineError, match="could not be read into the context"):
        model.infer("What color is the background?", images=[disc("red", "blue")])


def test_images_inside_messages_and_paths(model: nb.Model, tmp_path: Path) -> None:
    picture = disc("red", "blue")
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What color is the background?"},
    ]
    inside = model.infer(messages=[{"role": "user", "content": parts}])
    file = tmp_path / "disc.png"
    file.write_bytes(picture)
    beside = model.infer("What color is the background?", images=[file])
    assert inside.text == beside.text == "The background is blue."


@pytest.mark.parametrize(
    ("images", "problem"),
    [([b"not a picture"], "image 0 cannot be read"), ([b""], "image 0"), (["missing.png"], "missing.png")],
)
def test_what_is_no_image_is_refused(model: nb.Model, images: list[Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        model.infer("What is this?", images=images)


def test_nothing_is_fetched_from_the_network(model: nb.Model) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    with pytest.raises(RequestError, match="nothing is fetched"):
        model.infer(messages=[{"role": "user", "content": [part]}])


def test_a_typed_marker_is_only_text(model: nb.Model) -> None:
    assert model.infer("Hello! <__media__>", images=[disc("red", "blue")], max_tokens=5).text


def test_too_many_images_name_the_numbers(model: nb.Model) -> None:
    with pytest.raises(ContextOverflow, match="context"):
        model.infer("What is this?", images=[disc("red", "blue")] * 200)


def test_a_text_model_says_what_it_lacks() -> None:
    with (
        nb.load("demo", threads=1, name="text-only") as model,
        pytest.raises(NotSupported, match="image encoder"),
    ):
        model.infer("What is this?", images=[disc("red", "blue")])


def test_a_projector_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="projector"):
        nb.load("demo-vision", threads=1, name="wrong", projector=demo_path())
