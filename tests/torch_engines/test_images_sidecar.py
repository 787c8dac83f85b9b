"""Images through the sidecar: the same as in the kernel, for any client, and through kills."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support import sidecar as support
from support.sidecar import until

from nbinfer import session
from nbinfer.contract.errors import NotSupported
from nbinfer.contract.requests import ImageRequest
from nbinfer.contract.results import ImageDone, ImageProgress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.sidecar import Sidecar

    from nbinfer.session import Model

pytestmark = pytest.mark.images


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from nbinfer.frames.journal import close_all

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBINFER_CACHE", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder
        close_all()


@pytest.fixture(scope="module")
def served(cache: Path) -> Iterator[Sidecar]:
    folder = support.make_folder()
    process = support.start(folder, "--port", "0", "--ram", "4G")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(support.VARIABLE, str(folder))
        try:
            yield support.ready(process, folder)
        finally:
            support.end(process, folder)


@pytest.fixture(scope="module")
def kernel(cache: Path) -> Iterator[Model]:
    model = session.load("demo-image", name="image-kernel", threads=1)
    yield model
    model.unload()


@pytest.fixture(scope="module")
def sidecar(served: Sidecar) -> Iterator[Model]:
    model = session.load("demo-image", name="image-sidecar", where="sidecar", threads=1)
    yield model
    model.unload()


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1, "steps": 3},
        {"seed": 2**32 - 1, "steps": 2, "n": 2},
        {"seed": 5, "steps": 2, "size": "48x72", "guidance": 1.0},
        {"seed": 5, "steps": 2, "negative_prompt": "a house"},
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_image_in_the_kernel_and_through_the_sidecar(
    kernel: Model, sidecar: Model, options: dict[str, Any]
) -> None:
    expected = kernel.generate_image("a red fish", **options)
    found = sidecar.generate_image("a red fish", **options)
    assert [image.png for image in found] == [image.png for image in expected]
    assert [image.seed for image in found] == [image.seed for image in expected]
    assert found.params == expected.params
    assert sidecar.info.effective == kernel.info.effective


def test_a_frame_is_filled_alike_and_shares_its_journal(kernel: Model, sidecar: Model) -> None:
    import nbinfer as nb

    rows = ["a red fish", "a ship"]
    made = nb.generate_images(rows, model=sidecar, steps=2)
    found = nb.generate_images(rows, model=kernel, steps=2)
    assert list(made["source"]) == ["run", "run"]
    assert list(found["source"]) == ["cache", "cache"], "the same weights, device and settings"
    computed = nb.generate_images(rows, model=kernel, steps=2, cache=False)
    assert [image.tobytes() for image in computed["image"]] == [image.tobytes() for image in made["image"]]


def test_steps_pictures_and_images_come_as_they_are_made(sidecar: Model) -> None:
    stream = sidecar.images("x", n=2, steps=3, seed=1, previews=1)
    events = list(stream)
    steps = [event for event in events if isinstance(event, ImageProgress)]
    assert [(event.index, event.step) for event in steps] == [(i, s) for i in (0, 1) for s in (1, 2, 3)]
    assert sum(event.preview is not None for event in steps) == 2
    assert [event.index for event in events if isinstance(event, ImageDone)] == [0, 1]


def test_a_stop_between_two_steps_keeps_the_finished_images(kernel: Model, sidecar: Model) -> None:
    stream = sidecar.images("x", n=50, steps=30, seed=1)
    for event in stream:
        if isinstance(event, ImageProgress) and (event.index, event.step) == (2, 3):
            stream.cancel()
    result = stream.result()
    assert result.finish_reason == "interrupted"
    assert [image.seed for image in result][:2] == [1, 2]
    assert len(result) < 50
    assert result[0].png == kernel.generate_image("x", steps=30, seed=1)[0].png
    # The runner has stopped as well: the next one need not wait for 48 images.
    assert sidecar.generate_image("y", steps=1).finish_reason == "stop"


def test_the_openai_package_works_as_it_is(served: Sidecar, kernel: Model) -> None:
    import openai

    client = openai.OpenAI(base_url=served.address, api_key=served.token)
    found = client.images.generate(
        model="demo-image", prompt="a red fish", n=2, size="48x64", response_format="b64_json"
    )
    assert found.size == "48x64"
    assert found.data is not None
    assert [base64.b64decode(each.b64_json or "")[:8] for each in found.data] == [b"\x89PNG\r\n\x1a\n"] * 2
    seeded = client.images.generate(
        model="demo-image", prompt="a red fish", extra_body={"seed": 4, "steps": 2, "guidance": 5.0}
    )
    expected = kernel.generate_image("a red fish", seed=4, steps=2, guidance=5.0)
    assert seeded.data is not None
    assert base64.b64decode(seeded.data[0].b64_json or "") == expected[0].png
    events = list(
        client.images.generate(
            model="demo-image", prompt="x", stream=True, partial_images=2, extra_body={"steps": 6, "seed": 1}
        )
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    whole = kernel.generate_image("x", steps=6, seed=1)
    assert base64.b64decode(events[-1].b64_json) == whole[0].png
    with pytest.raises(openai.BadRequestError, match="b64_json"):
        client.images.generate(model="demo-image", prompt="x", response_format="url")


def test_a_server_known_by_its_address_makes_images_too(served: Sidecar, sidecar: Model) -> None:
    with session.load(
        "image-sidecar",
        backend="openai",
        mode="image-generation",
        name="image-server",
        base_url=served.address,
        api_key=served.token,
    ) as model:
        found = model.generate_image("a red fish", seed=3, n=2)
        assert [image.seed for image in found] == [3, 4]
        expected = sidecar.generate_image("a red fish", seed=3, n=2)
        assert [image.png for image in found] == [image.png for image in expected]
        with pytest.raises(NotSupported, match="takes no steps"):
            model.generate_image("x", steps=3)


def test_a_batch_whose_runner_is_killed_is_whole_when_it_is_run_again(sidecar: Model, kernel: Model) -> None:
    import nbinfer as nb

    rows = [f"picture {i}" for i in range(6)]
    options: dict[str, Any] = {"model": sidecar, "steps": 40, "progress": False}
    killed = threading.Event()

    def kill() -> None:
        until(lambda: nb.last_run().progress.computed >= 2, 60, "two images are there")
        psutil.Process(sidecar.engine.hold.pid).kill()  # type: ignore[attr-defined]
        killed.set()

    nb.generate_images(["before"], **{**options, "steps": 1})  # what last_run() was until now
    thread = threading.Thread(target=kill)
    thread.start()
    first = nb.generate_images(rows, **options)
    thread.join()
    assert killed.is_set()
    done = int(first["image"].notna().sum())
    assert done >= 2
    again = nb.generate_images(rows, **options)
    assert again["image"].notna().all()
    assert list(again["source"]).count("cache") == done
    expected = kernel.generate_image(rows[5], steps=40, seed=int(again["seed"].iloc[5]))
    assert again["image"].iloc[5].tobytes() == expected.image.tobytes()


_BATCH = """
import json, os, signal, sys
import nbinfer as nb

class Sink:
    interval = 0.01
    def update(self, progress):
        if progress.done >= int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    def close(self, progress):
        pass

nb.load("demo-image", threads=1)
made = nb.generate_images([f"row {i}" for i in range(5)], steps=25, progress=Sink())
print(json.dumps([list(made["source"]), int(made["image"].notna().sum())]))
"""


def _run_batch(rows: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BATCH, rows]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_batch_whose_kernel_is_killed_goes_on_where_it_was(cache: Path) -> None:
    killed = _run_batch("2")
    assert killed.returncode == -9, killed.stderr
    again = _run_batch("99")
    sources, images = json.loads(again.stdout)
    assert images == 5
    assert 2 <= sources.count("cache") < 5
    assert sources.count("run") == 5 - sources.count("cache")


def test_what_is_not_asked_of_an_image_model_is_refused_there_too(sidecar: Model) -> None:
    with pytest.raises(NotSupported, match="loaded for image-generation"):
        sidecar.infer("hello")
    stream = sidecar.submit(ImageRequest(prompt="x", n=3, steps=200))
    assert stream.next_event(60) is not None
    stream.cancel()
    assert stream.result(30).finish_reason == "interrupted"
