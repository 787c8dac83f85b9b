"""From a parsed line to an answer: names looked up, the model asked, the answer shown and bound."""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbinfer import session
from nbinfer.contract.errors import short_interrupt
from nbinfer.contract.modes import Mode
from nbinfer.contract.results import ImageResult, Result
from nbinfer.display.code import code_block
from nbinfer.display.sinks import (
    JupyterSink,
    NullSink,
    ShownResult,
    Sink,
    TerminalSink,
    follow,
    interrupt_later,
)
from nbinfer.display.style import page
from nbinfer.display.text import escape, printable
from nbinfer.magics import template
from nbinfer.magics.options import INFER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbinfer.contract.requests import Message
    from nbinfer.display.images import ShownImages
    from nbinfer.display.result import View
    from nbinfer.magics.parser import Given
    from nbinfer.session import ImageStream, Model, TextStream


_PREVIEWS = 8
"""Pictures of an image on its way: each costs a small decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How an answer is shown: by view, in place or printed, growing or once."""

    view: View = "rich"
    footer: bool = True
    live: bool = True
    quiet: bool = False
    in_place: bool = True

    def sink(self, model: str) -> Sink:
        """Return a sink for one answer."""
        if self.quiet:
            return NullSink()
        if self.in_place:
            return JupyterSink(model=model, view=self.view, footer=self.footer, live=self.live)
        return TerminalSink(view=self.view, live=self.live)

    def shown(self, result: Result) -> ShownResult:
        """Return the result as one that is on screen already."""
        in_terminal = not (self.quiet or self.in_place)
        return ShownResult.of(result, view=self.view, footer=self.footer, in_terminal=in_terminal)


@dataclass(slots=True)
class Chats:
    """Named conversations: the messages so far, the system prompt included."""

    by_name: dict[str, list[Message]] = field(default_factory=dict)

    def open(self, name: str, system: str | None, *, new: bool) -> list[Message]:
        """Return the messages of a conversation, which may have begun just now.

        Raises
        ------
        UsageError
            It has begun already, with another system prompt.
        """
        known = [] if new else self.by_name.get(name, [])
        if not known:
            return [] if system is None else [{"role": "system", "content": system}]
        if system is not None and known[0] != {"role": "system", "content": system}:
            raise UsageError(
                f"the conversation {name!r} began with another system prompt; --new begins it anew."
            )
        return list(known)

    def forget(self, name: str | None) -> None:
        """Forget one conversation, or all.

        Raises
        ------
        UsageError
            There is none of that name.
        """
        if name is None:
            self.by_name.clear()
        elif self.by_name.pop(name, None) is None:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise UsageError(f"there is no conversation {name!r}. Conversations: {known}.")


# -- names in the notebook ----------------------------------------------------------------------------------


def variable(names: Mapping[str, Any], name: str, flag: str) -> Any:
    """Return a variable of the notebook, or an attribute of one: ``shop.Order``.

    Raises
    ------
    UsageError
        There is none of that name.
    """
    first, *attributes = name.split(".")
    if first not in names:
        near = difflib.get_close_matches(first, [n for n in names if not n.startswith("_")], n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"{flag} {name}: there is no variable {first!r}.{hint}")
    value = names[first]
    for attribute in attributes:
        if not hasattr(value, attribute):
            raise UsageError(f"{flag} {name}: {type(value).__name__} has no attribute {attribute!r}.")
        value = getattr(value, attribute)
    return value


def _file(path: str, flag: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        near = _near_files(path)
        raise UsageError(f"{flag} {path}: {reason}.{near}") from None


def _near_files(path: str) -> str:
    folder = Path(path).expanduser().parent
    with suppress(OSError):
        near = difflib.get_close_matches(Path(path).name, [p.name for p in folder.iterdir()], n=1)
        if near:
            return f" Did you mean {folder / near[0]}?"
    return ""


def _schema(names: Mapping[str, Any], text: str) -> Any:
    if text.endswith(".json"):
        try:
            return json.loads(_file(text, "--schema"))
        except ValueError as error:
            raise UsageError(f"--schema {text}: not JSON: {error}.") from None
    return variable(names, text, "--schema")


def _choices(names: Mapping[str, Any], value: Any) -> list[str]:
    if isinstance(value, list):
        return value
    near: list[str] = []
    if value.isidentifier():
        held = names.get(value)
        if isinstance(held, Iterable) and not isinstance(held, str):
            return [str(item) for item in held]
        lists = [name for name in names if name[0] != "_" and isinstance(names[name], list | tuple | set)]
        near = difflib.get_close_matches(value, lists, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(
        f"--choices {value}: neither a variable that holds a list, nor two choices or more: a,b.{hint}"
    )


def _image(names: Mapping[str, Any], text: str) -> Any:
    if text.isidentifier() and text in names:
        return names[text]
    path = Path(text).expanduser()
    if path.is_file():
        return path
    raise UsageError(f"--image {text}: neither a variable nor a file.{_near_files(text)}")


def infer_options(given: Given, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of :func:`nbinfer.infer` that a line asks for, ``model`` aside.

    Raises
    ------
    UsageError
        A variable or file that an option names is not there.
    """
    values = given.values
    keywords = {option.name: option.keyword for option in INFER if option.keyword and option.name != "model"}
    options = {keyword: values[name] for name, keyword in keywords.items() if name in values}
    if "system_var" in values:
        options["system"] = template.as_text(variable(names, values["system_var"], "--system-var"))
    if "schema" in values:
        options["schema"] = _schema(names, values["schema"])
    if "choices" in values:
        options["choices"] = _choices(names, values["choices"])
    if "grammar" in values:
        options["grammar"] = _file(values["grammar"], "--grammar")
    if "images" in values:
        options["images"] = [_image(names, text) for text in values["images"]]
    if "params" in values:
        options["params"] = dict(values["params"])
    return options


def image_options(given: Given) -> dict[str, Any]:
    """Return the keywords of :func:`nbinfer.generate_image` that a line asks for, ``model`` aside."""
    values = given.values
    options = {
        option.images: values[option.name] for option in INFER if option.images and option.name in values
    }
    return {**options, **dict(values.get("params", ()))}


# -- asking -------------------------------------------------------------------------------------------------


def answer(
    prompt: str,
    *,
    model: str | None,
    options: dict[str, Any],
    history: list[Message] | None,
    look: Look,
    keep: Callable[[ShownResult], None],
) -> ShownResult:
    """Ask the model and show the answer while it grows.

    Parameters
    ----------
    history
        The conversation that the prompt continues; None for a single question.
    keep
        Called exactly once with what there is in the end, also when this raises.

    Raises
    ------
    NbinferError
        The request or the engine failed; ``keep`` has got what there was.
    KeyboardInterrupt
        The person stopped it; ``keep`` has got what there was.
    """
    with short_interrupt("the answer was stopped; what there is of it was kept."):
        return _answer(prompt, model=model, options=options, history=history, look=look, keep=keep)


def _answer(
    prompt: str,
    *,
    model: str | None,
    options: dict[str, Any],
    history: list[Message] | None,
    look: Look,
    keep: Callable[[ShownResult], None],
) -> ShownResult:
    stream: TextStream | None = None
    sink: Sink = NullSink()
    try:
        found = session.get(model)
        if history is None:
            stream = found.stream(prompt, **options)
        else:
            stream = found.stream(messages=[*history, {"role": "user", "content": prompt}], **options)
        sink = look.sink(found.name)
        follow(stream.events(), sink)
        result = stream.result()
    except BaseException as error:
        with interrupt_later():  # a person presses ■ twice, and it must not cost what there is
            if stream is not None:
                stream.cancel()
            partial = _what_there_is(stream, error)
            keep(look.shown(partial))
            if stream is not None:  # what failed before it began has nothing to show but the error itself
                sink.finish(partial)
        raise
    shown = look.shown(result)
    keep(shown)
    sink.finish(result)
    return shown


def images(
    prompt: str,
    *,
    model: str | None,
    options: dict[str, Any],
    look: Look,
    keep: Callable[[ShownImages], None],
    path: str | None,
) -> ShownImages:
    """Make images and show them on their way.

    Parameters
    ----------
    keep
        Called exactly once with what there is in the end, also when this raises.
    path
        Where to save the image; of several, the second is ``NAME-2.png``. None: nowhere.

    Raises
    ------
    NbinferError
        The request or the engine failed; ``keep`` has got what there was.
    KeyboardInterrupt
        The person stopped it; ``keep`` has got the finished images.
    """
    from nbinfer.display.images import ImageSink, ImageTerminalSink, ShownImages

    stream: ImageStream | None = None
    sink: ImageSink | ImageTerminalSink | None = None
    with short_interrupt("the images were stopped; the finished ones were kept."):
        try:
            found = session.get(model, mode=Mode.IMAGE_GENERATION)
            live = look.live and not look.quiet
            stream = found.images(
                prompt, **{"previews": _PREVIEWS if live and look.in_place else 0, **options}
            )
            if not look.quiet:
                sink = ImageSink(model=found.name) if look.in_place else ImageTerminalSink()
            for event in stream:
                if sink is not None and live:
                    sink.event(event)
            result = stream.result()
        except BaseException as error:
            with interrupt_later():
                partial = ImageResult(images=(), prompt=prompt)
                if stream is not None:
                    stream.cancel()
                    partial = stream.partial()
                stopped = isinstance(error, KeyboardInterrupt)
                partial = partial.with_changes(
                    finish_reason="interrupted" if stopped else "error",
                    error=None if stopped else str(error) or type(error).__name__,
                )
                keep(ShownImages.of(partial))
                _save_images(partial, path)
                if sink is not None:
                    sink.finish(partial)
            raise
    shown = ShownImages.of(result)
    keep(shown)
    _save_images(result, path)
    if sink is not None:
        sink.finish(result)
    return shown


def _save_images(result: ImageResult, path: str | None) -> None:
    for number, image in enumerate(result.images if path is not None else (), start=1):
        target = Path(str(path))
        image.save(target if number == 1 else target.with_stem(f"{target.stem}-{number}"))


def _what_there_is(stream: TextStream | None, error: BaseException) -> Result:
    partial = Result(text="") if stream is None else stream.partial()
    if isinstance(error, KeyboardInterrupt):
        return partial.with_changes(finish_reason="interrupted")
    return partial.with_changes(finish_reason="error", error=str(error) or type(error).__name__)


def over_rows(
    spec: str,
    prompt: str,
    names: Mapping[str, Any],
    *,
    model: str | None,
    options: dict[str, Any],
    images: bool = False,
) -> Any:
    """Ask once per row: ``FRAME`` or ``FRAME.COL``, where a body without a field ends in that column.

    Raises
    ------
    UsageError
        There is no such variable.
    """
    from nbinfer import frames

    name, _, column = spec.partition(".")
    data = variable(names, name, "--over")
    if column and not _has_field(prompt):
        prompt = f"{prompt.rstrip()}\n\n{{{column}}}" if prompt.strip() else f"{{{column}}}"
    options = {**options, **options.pop("params", {})}
    operator = frames.generate_images if images else frames.complete
    return operator(data, prompt, model=model, **options)


def _has_field(prompt: str) -> bool:
    with suppress(ValueError):
        return any(name is not None for _, name, _, _ in string.Formatter().parse(prompt))
    return True  # malformed: the template's own error says it best


def dry_run(
    prompt: str, *, model: str | None, options: dict[str, Any], history: list[Message] | None
) -> None:
    """Show the prompt as the model would get it, and its length in tokens."""
    from IPython.display import display

    found: Model = session.get(model)
    if history is None:
        request = found.request(prompt, **options)
    else:
        request = found.request(messages=[*history, {"role": "user", "content": prompt}], **options)
    text, tokens = found.engine.render(request)
    words = f"{found.name}: {tokens} of {found.info.context_size} tokens; nothing was run"
    shown = page(code_block(text), f'<div class="nbinfer-foot">{escape(words)}</div>')
    display(  # type: ignore[no-untyped-call]
        {"text/plain": f"{printable(text)}\n[{printable(words)}]", "text/html": shown}, raw=True
    )
