"""Images in a notebook's shell: what is shown on the way, bound, saved and kept when it is stopped."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest
from IPython.core.error import UsageError
from support.notebook import Notebook, notebook

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.images


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from nbinfer.frames.journal import close_all

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBINFER_CACHE", str(folder))
        yield folder
        close_all()


@pytest.fixture
def nb(cache: Path) -> Iterator[Notebook]:
    with notebook() as opened:
        opened.run("%nbinfer load demo-image -p threads=1")
        yield opened


def test_a_cell_shows_steps_and_a_picture_and_ends_with_the_image(nb: Notebook, tmp_path: Path) -> None:
    from PIL import Image

    target = tmp_path / "fish.png"
    nb.set(target=target)
    nb.run(
        "%%infer --image-out {{ target }} --steps 9 --seed 3 --count 2 --size 48x64 -o r\na red {{ 'fish' }}"
    )
    more = nb.outputs[1:]
    # The first looks at the clock: which steps are shown between is a matter of speed, pictures always are.
    assert [output["update"] for output in more] == [True] * len(more)
    on_the_way = [output["data"]["text/html"] for output in nb.outputs[:-1]]
    assert sum('alt="the image on its way"' in html for html in on_the_way) >= 8
    assert any("image 2 of 2, step" in html and 'alt="seed 3"' in html for html in on_the_way)
    last = more[-1]["data"]
    assert last["text/html"].count("<img ") == 2
    assert "a red fish · seed 4" in last["text/html"]
    assert more[-1]["metadata"]["nbinfer"]["seed"] == 3
    assert [image.seed for image in nb["r"]] == [3, 4]
    assert target.read_bytes() == nb["r"][0].png
    with Image.open(tmp_path / "fish-2.png") as second:
        assert second.size == (48, 64)
    assert nb.run("r") is nb["r"]


def test_a_stop_keeps_the_finished_images(
    nb: Notebook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nb.set(target=tmp_path / "x.png")
    over = threading.Event()

    def press() -> None:
        # When the third image is on its way.
        while not over.wait(0.005):
            if any("image 3 of" in html for html in _htmls(nb)):
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            nb.run("%%infer --image-out {{ target }} --steps 20 --seed 1 --count 100 -o r\nx")
    finally:
        over.set()
        thread.join()
    assert nb["r"].finish_reason == "interrupted"
    assert [image.seed for image in nb["r"]][:2] == [1, 2]
    assert len(nb["r"]) < 100
    assert "interrupted" in nb.texts[-1]
    assert (tmp_path / "x.png").is_file()
    assert capsys.readouterr().out.startswith("KeyboardInterrupt: the images were stopped")


def _htmls(nb: Notebook) -> list[str]:
    return [output["data"].get("text/html", "") for output in list(nb.outputs)]


def test_rows_are_drawn_with_the_image_on_its_way(nb: Notebook) -> None:
    nb.run("animals = ['fish', 'bird']")
    frame = nb.run("%%infer --over animals --image-out --steps 12\na red {text}")
    assert list(frame["error"].isna()) == [True, True]
    assert (
        nb.run("%%infer --over animals --image-out --steps 12\na red {text}")["source"].tolist()
        == ["cache"] * 2
    )
    assert frame["image"].iloc[0].text["parameters"].startswith("a red fish\nSteps: 12")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--size 64x64", "--size is for images: add --image-out"),
        ("--image-out --temperature 1", "--temperature is for answers in words"),
        ("--image-out --json", "--json is for answers in words"),
        ("--image-out --chat=x", "--chat is for answers in words"),
    ],
)
def test_options_of_words_and_of_images_are_told_apart(nb: Notebook, line: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        nb.run(f"%%infer {line}\nx")


def test_a_terminal_gets_words(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with notebook(terminal=True) as shell:
        shell.run("%nbinfer load demo-image -p threads=1")
        shell.run("%infer --image-out --count 2 --seed 4 --steps 1 -- x")
        said = capsys.readouterr().err
    assert "image 2: 64x64, seed 5\n" in said
    assert "[demo-image · 2 images · 64x64 · 1 steps · seed 4" in said


def test_the_panel_shows_image_models_with_their_badge_and_estimate(nb: Notebook) -> None:
    import nbinfer
    from nbinfer.widgets.controller import Controller
    from nbinfer.widgets.planner import MemoryPlanner
    from nbinfer.widgets.snapshot import snapshot

    controller = Controller(MemoryPlanner())
    try:
        controller.look()
        controller.look_around()
        controller.plan("demo-image", {})
        text = snapshot("panel", controller.state.parts())[0]["text/plain"]
    finally:
        controller.close()
    assert "StableDiffusionPipeline" in text
    assert "image-generation" in text
    assert "denoiser" in text
    (row,) = controller.state.parts()["loaded"]["rows"]
    assert row["mode"] == "image-generation"
    assert "measured" in row["memory"]
    assert "estimated" in row["memory"]
    (listed,) = [each for each in controller.state.parts()["models"]["rows"] if each["name"] == "demo-image"]
    assert (listed["verdict"], listed["kind"], listed["problem"]) == ("fits", "ok", "")
    table = nbinfer.models().set_index("name").loc["demo-image"]
    assert (table["modes"], table["verdict"]) == ("image-generation", "fits")
