"""Loading for real: names, replacements, waiting, going, and what a call gives back."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import shutil
import threading
import time
import weakref
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from pydantic import BaseModel, Field
from support.pictures import disc

import nbinfer as nb
from nbinfer.contract.errors import ConfigError, DoesNotFit, ModelNotFound, NotSupported
from nbinfer.models.demo import demo_path
from nbinfer.session.plans import _given_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    nb.unload()


def until(holds: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_the_same_load_again_is_the_same_model_and_another_setting_replaces_it() -> None:
    first = nb.load("demo", threads=1)
    assert nb.load("demo", threads=1) is first
    second = nb.load("demo", threads=1, context_size=512)
    assert nb.loaded() == [second]
    assert second.info.context_size == 512


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "reranking"}, NotSupported),
        ({"context_size": "1024"}, ConfigError),
        ({"kv_type": "q9"}, ConfigError),
        ({"lora": "/no/such/adapter.gguf"}, ModelNotFound),
    ],
)
def test_a_load_that_fails_leaves_the_model_that_was_there(
    options: dict[str, Any], error: type[Exception]
) -> None:
    model = nb.load("demo", threads=1)
    with pytest.raises(error):
        nb.load("demo", threads=1, **options)
    assert nb.loaded() == [model]
    assert model.infer("What is 2 plus 3?").text == "2 plus 3 is 5."


def test_a_name_of_ones_own_stays_its_own() -> None:
    long = nb.load("demo", name="long", threads=1)
    plain = nb.load("demo", threads=1, context_size=512)
    assert [m.name for m in nb.loaded()] == ["long", "demo"]
    assert nb.get("long") is long
    assert nb.get("demo") is plain


def test_two_files_of_one_name_live_side_by_side(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "model.gguf" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        shutil.copy(demo_path(), path)
    first, second = (nb.load(path, threads=1) for path in paths)
    assert (first.name, second.name) == ("model", "model-2")
    assert nb.load(paths[1], threads=1) is second
    assert len(nb.loaded()) == 2


def test_callers_at_once_share_one_load() -> None:
    models: list[nb.Model] = []
    callers = [threading.Thread(target=lambda: models.append(nb.load("demo", threads=1))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len({id(model) for model in models}) == 1
    assert models[0].infer("Hello!").text


def test_a_model_that_goes_when_idle_waits_for_its_first_use() -> None:
    model = nb.load("demo", threads=1, keep_alive=0)
    time.sleep(0.3)
    assert model.infer("Hello!").text
    assert until(lambda: nb.loaded() == [])


def test_keep_alive_can_be_changed() -> None:
    model = nb.load("demo", threads=1, keep_alive=0.4)
    assert nb.load("demo", threads=1, keep_alive=-1) is model
    time.sleep(0.9)
    assert nb.loaded() == [model]
    nb.load("demo", threads=1, keep_alive="100ms")
    assert until(lambda: nb.loaded() == [])


def test_a_stream_that_nobody_holds_stops() -> None:
    model = nb.load("demo", threads=1)
    stream = model.stream("Tell me a story about a dog.", temperature=1.0)
    next(iter(stream))
    del stream
    assert until(lambda: model.engine.load().running == 0)


class Tags(BaseModel):
    tags: Annotated[set[int], Field(max_length=3)]
    sure: bool


def test_schemas_hold_for_fields_the_grammar_cannot_say_and_take_no_others() -> None:
    model = nb.load("demo", threads=1)
    parsed = model.infer("Give me JSON.", schema=Tags, max_tokens=200).parsed
    assert isinstance(parsed.tags, set)
    closed = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert set(model.infer("What is 3 plus 2? Answer in JSON.", schema=closed).parsed) == {"a"}


def test_results_can_be_kept_elsewhere() -> None:
    model = nb.load("demo", threads=1)
    result = model.infer("What is 2 plus 3?")
    for made in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):  # noqa: S301 - our own bytes
        assert made == result
        with pytest.raises(nb.NbinferError, match="conversation"):
            made.reply("And 3 plus 3?")


def test_a_chat_remembers_its_images() -> None:
    model = nb.load("demo-vision", threads=1)
    chat = model.chat()
    chat.send("What color is the shape?", images=disc("red", "blue"))
    second = chat.send("What color is the background?")
    assert second.usage.prompt_tokens > 2 * model.infer("What color is the background?").usage.prompt_tokens
    assert chat.messages[0]["content"][0]["type"] == "image_url"


def test_dry_runs_count_images() -> None:
    model = nb.load("demo-vision", threads=1)
    request = model.request("What is this?", images=[disc("red", "blue")])
    assert (
        model.engine.render(request)[1]
        == model.infer("What is this?", images=[disc("red", "blue")]).usage.prompt_tokens
    )


def test_a_file_of_an_unknown_architecture_says_so(tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(demo_path().read_bytes().replace(b"llama", b"xlama", 1))
    with pytest.raises(nb.NbinferError) as caught:
        nb.load(strange, threads=1)
    assert "xlama" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_a_dry_run_says_what_a_load_would_do_and_does_nothing() -> None:
    plan = nb.dry_run("demo", threads=1)
    assert (plan.loaded, plan.unloads, plan.fits) == (False, (), True)
    assert plan.required is not None
    assert plan.required.ram > 2**20
    assert nb.loaded() == []
    model = nb.load("demo", threads=1)
    assert nb.dry_run("demo", threads=1).loaded
    other = nb.dry_run("demo", threads=1, context_size=512)
    assert other.unloads == ("demo",)
    assert "Unloaded for it: demo" in str(other)
    assert nb.dry_run("demo", name="two", context_size=512).unloads == ()
    assert nb.loaded() == [model]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how much memory is free."""
    from nbinfer.memory.machine import Ram

    machine = importlib.import_module("nbinfer.memory.machine")  # the name in the package is the function

    def say(amount: int) -> None:
        monkeypatch.setattr(machine, "main_memory", lambda: Ram(total=1 << 40, available=amount))

    return say


def test_a_reload_that_does_not_fit_is_refused_and_the_old_one_stays(free: Callable[[int], None]) -> None:
    model = nb.load("demo", threads=1)
    free(1 << 20)
    plan = nb.dry_run("demo", threads=1, context_size=10**7)
    assert (plan.fits, plan.unloads) == (False, ())
    assert "free once the loaded one is gone" in plan.reason
    with pytest.raises(DoesNotFit) as caught:
        nb.load("demo", threads=1, context_size=10**7)
    assert str(caught.value) == plan.reason
    assert len(plan.reason.splitlines()) <= 5
    assert nb.loaded() == [model]
    assert model.infer("What is 2 plus 3?").text == "2 plus 3 is 5."


def test_a_reload_counts_what_the_old_one_gives_back_and_unloads_it_first(
    free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbinfer.backends.llamacpp import LlamaCppBackend

    there: list[list[str]] = []
    opened = LlamaCppBackend.open

    def watched(self: LlamaCppBackend, path: Path, **options: Any) -> Any:
        there.append([model.name for model in nb.loaded()])
        return opened(self, path, **options)

    monkeypatch.setattr(LlamaCppBackend, "open", watched)
    nb.load("demo", threads=1, context_size=4096)
    other: dict[str, Any] = {"threads": 1, "context_size": 2048}
    needed = nb.estimate("demo", context_size=2048)
    free(needed.ram.known)  # without what the process needs
    assert not nb.dry_run("demo", name="beside", **other).fits
    plan = nb.dry_run("demo", **other)
    assert (plan.fits, plan.unloads, plan.required) == (True, ("demo",), needed.required)
    model = nb.load("demo", **other)
    assert (nb.loaded(), there[-1]) == ([model], []), "gone before"
    free(1 << 40)
    last = nb.load("demo", threads=1, context_size=1024)
    assert (nb.loaded(), there[-1]) == ([last], ["demo"]), "there until the new one was"


def test_a_misspelled_option_costs_nobody_the_model_that_would_go(free: Callable[[int], None]) -> None:
    model = nb.load("demo", threads=1, context_size=4096)
    free(nb.estimate("demo", context_size=2048).ram.known)  # no room for both
    for ask in (nb.load, nb.dry_run):
        with pytest.raises(ConfigError, match="threads"):
            ask("demo", context_size=2048, thread=1)
        with pytest.raises(NotSupported, match="does not generate images"):
            ask("demo", context_size=2048, mode="image-generation")
    assert nb.loaded() == [model]
    assert model.infer("What is 2 plus 3?").text == "2 plus 3 is 5."


def test_what_a_model_gives_back_is_what_it_has_written_to() -> None:
    model = nb.load("demo", threads=1, context_size=65_536)
    ram, counted = model.memory.ram, _given_back(model)
    assert ram.compute > ram.overhead[1]
    assert ram.cache <= counted.ram <= ram.cache + ram.overhead[1] + ram.output


def test_a_model_that_was_replaced_is_let_go() -> None:
    gone = weakref.ref(nb.load("demo", threads=1))
    model = nb.load("demo", threads=1, context_size=512)
    assert model.memory is not None
    gc.collect()
    assert gone() is None


def test_the_same_file_under_another_backend_is_another_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbinfer.backends import registry
    from nbinfer.backends.llamacpp import LlamaCppBackend

    class Other(LlamaCppBackend):
        name = "other"

    known = registry.backends() | {"other": Other()}
    monkeypatch.setattr(registry, "_found", lambda: known)
    first = nb.load("demo", threads=1)
    assert nb.load("demo", threads=1, backend="llamacpp") is first
    second = nb.load("demo", threads=1, backend="other")
    assert (nb.loaded(), second.backend) == ([second], "other")
    assert not nb.dry_run("demo", threads=1).loaded


def test_a_dry_run_gives_a_file_the_name_that_a_load_would(tmp_path: Path) -> None:
    shutil.copy(demo_path(), tmp_path / "demo.gguf")
    nb.load("demo", threads=1, name="demo")
    plan = nb.dry_run(tmp_path / "demo.gguf", threads=1)
    assert (plan.name, plan.unloads) == ("demo-2", ())
    assert nb.load(tmp_path / "demo.gguf", threads=1).name == "demo-2"


def test_a_dry_run_of_what_does_not_fit_says_why_and_what_would() -> None:
    plan = nb.dry_run("demo", context_size=10**9)
    assert not plan.fits
    assert "force=True" in plan.reason
    assert "would not be loaded" in str(plan)
    assert nb.dry_run("demo", context_size=10**9, force=True).fits


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("no-such-model",), ModelNotFound),
        (("hf:someone/something",), ModelNotFound),
        (("demo", "nowhere"), ConfigError),
    ],
)
def test_a_dry_run_downloads_nothing_and_refuses_what_a_load_refuses(
    arguments: tuple[str, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        nb.dry_run(arguments[0], where=arguments[1] if arguments[1:] else "kernel")
