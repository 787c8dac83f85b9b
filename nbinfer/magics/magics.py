"""``%infer``, ``%%infer`` and ``%nbinfer`` themselves: thin, the work is done next door."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import (
    Magics,
    line_cell_magic,
    line_magic,
    magics_class,
    needs_local_scope,
    no_var_expand,
)

from nbinfer.display.style import page
from nbinfer.display.text import escape
from nbinfer.magics import ask, commands, template
from nbinfer.magics.options import INFER_USAGE, infer_help, nbinfer_help
from nbinfer.magics.parser import find_command, next_word, parse_command, parse_infer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.display.images import ShownImages
    from nbinfer.display.sinks import ShownResult
    from nbinfer.magics.parser import Given
    from nbinfer.magics.settings import NbInfer


# Programs that show a kernel's outputs in a terminal, where none can be replaced by a newer one.
_CONSOLE = re.compile(r"jupyter[-_ ](qt)?console")


@lru_cache(maxsize=1)
def started_by_a_console() -> bool:
    """Whether this kernel belongs to ``jupyter console``, by the process that started it."""
    import psutil

    try:
        parent = psutil.Process().parent()
        words = " ".join(parent.cmdline()) if parent is not None else ""
    except psutil.Error:
        return False
    return _CONSOLE.search(words) is not None


def show_help(text: str) -> None:
    """Display a help text, which is made of the table of options."""
    from IPython.display import display

    display(  # type: ignore[no-untyped-call]
        {"text/plain": text, "text/html": page(f"<pre>{escape(text)}</pre>")}, raw=True
    )


@magics_class
class NbInferMagics(Magics):
    """The magics of one shell."""

    def __init__(self, shell: Any, settings: NbInfer) -> None:
        super().__init__(shell)
        self._shell = shell
        self.settings = settings
        self.chats = ask.Chats()
        self._fresh: list[ShownResult | ShownImages] = []

    def settle(self, *_: Any) -> None:
        """After each cell: what it has shown may be shown again."""
        for result in self._fresh:
            result.settle()
        self._fresh.clear()

    @property
    def names(self) -> dict[str, Any]:
        """The notebook's variables."""
        return self._names({})

    def _names(self, local: Mapping[str, Any]) -> dict[str, Any]:
        return template.names_of({**self._shell.user_ns, **local}, self._shell.user_ns_hidden)

    # -- asking ---------------------------------------------------------------------------------------------

    @no_var_expand
    @needs_local_scope
    @line_cell_magic
    def infer(
        self, line: str = "", cell: str | None = None, local_ns: Mapping[str, Any] | None = None
    ) -> Any:
        """Ask a local model."""
        names = self._names(local_ns or {})  # inside a function, its own variables come first
        given = parse_infer(line, cell=cell is not None, expand=lambda text: template.expand(text, names))
        if given.values.get("help"):
            show_help(infer_help())
            return None
        # IPython ends each cell with a line end of its own; everything before it is the prompt.
        prompt = given.rest if cell is None else cell.removesuffix("\n")
        if not prompt.strip():
            raise UsageError(f"there is no prompt.\n{INFER_USAGE}")
        if "over" in given.values:
            return self._over(given, prompt, names)
        if not given.values.get("raw"):
            prompt = template.expand(prompt, names)
        if "image_out" in given.values:
            return self._draw(given, prompt)
        options = ask.infer_options(given, names)
        return self._ask(given, prompt, options)

    def _draw(self, given: Given, prompt: str) -> ShownImages:
        values = given.values
        return ask.images(
            prompt,
            model=values.get("model"),
            options=ask.image_options(given),
            look=self._look(values),
            keep=lambda shown: self._keep(shown, values.get("out")),
            path=values["image_out"] or None,
        )

    def _ask(self, given: Given, prompt: str, options: dict[str, Any]) -> ShownResult | None:
        values = given.values
        model, chat = values.get("model"), values.get("chat")
        history = None
        if chat is not None:
            history = self.chats.open(chat, options.pop("system", None), new=bool(values.get("new")))
        if values.get("dry_run"):
            ask.dry_run(prompt, model=model, options=options, history=history)
            return None
        result = ask.answer(
            prompt,
            model=model,
            options=options,
            history=history,
            look=self._look(values),
            keep=lambda shown: self._keep(shown, values.get("out")),
        )
        if history is not None and chat is not None:
            asked = {"role": "user", "content": prompt}
            self.chats.by_name[chat] = [*history, asked, {"role": "assistant", "content": result.text}]
        return result

    def _look(self, values: dict[str, Any]) -> ask.Look:
        settings = self.settings
        notebook = hasattr(self._shell, "kernel") and not started_by_a_console()
        return ask.Look(
            view="code" if values.get("extract") else values.get("view", settings.format),
            footer=settings.footer,
            live=settings.stream and not values.get("no_stream"),
            quiet=bool(values.get("quiet")),
            in_place=settings.display == "rich" or (settings.display == "auto" and notebook),
        )

    def _keep(self, shown: ShownResult | ShownImages, out: str | None) -> None:
        self._fresh.append(shown)
        if out is not None:
            self._shell.push({out: shown})

    def _over(self, given: Given, prompt: str, names: dict[str, Any]) -> Any:
        values = given.values
        if not values.get("raw"):
            # A value's own braces are no fields of the row's template.
            prompt = template.expand(
                prompt, names, quote=lambda text: text.replace("{", "{{").replace("}", "}}")
            )
        drawn = "image_out" in values
        options = ask.image_options(given) if drawn else ask.infer_options(given, names)
        frame = ask.over_rows(
            values["over"], prompt, names, model=values.get("model"), options=options, images=drawn
        )
        if values.get("out") is not None:
            self._shell.push({values["out"]: frame})
        return None if values.get("quiet") and values.get("out") is not None else frame

    # -- %nbinfer -------------------------------------------------------------------------------------------

    @no_var_expand
    @needs_local_scope
    @line_magic
    def nbinfer(self, line: str = "", local_ns: Mapping[str, Any] | None = None) -> Any:
        """Load, list and inspect local models."""
        word = next_word(line, 0)
        if word is None or word.text in ("-h", "--help"):
            show_help(nbinfer_help())
            return None
        command = find_command(word.text)
        names = self._names(local_ns or {})
        given = parse_command(command, line[word.end :], expand=lambda text: template.expand(text, names))
        if given.values.get("help") or command.name == "help":
            show_help(commands.help_text(command, given))
            return None
        return commands.run(command, given, self)


# `%infer?` shows these.
NbInferMagics.infer.__doc__ = infer_help()
NbInferMagics.nbinfer.__doc__ = nbinfer_help()
