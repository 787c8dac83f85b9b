"""The table of all options, which the parser, the help, the docstrings, the completion and the tests read."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from nbinfer.display.result import VIEWS

Kind: TypeAlias = Literal["flag", "text", "escaped", "int", "float", "name", "pair", "list"]
r"""What an option's value is.

``flag`` takes none, ``escaped`` is text in which ``\n``, ``\t`` and ``\\`` are one character, ``pair`` is
KEY=JSON, ``list`` is a,b,c.
"""

Completes: TypeAlias = Literal["", "model", "variable", "path", "mode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a magic.

    Parameters
    ----------
    name
        The key of its value after parsing.
    keyword
        The keyword of :func:`nbinfer.infer` (or of the function behind a subcommand) that it fills; None when
        it is about the notebook alone.
    value
        What a flag stands for.
    repeat
        May be given several times; the value is a list.
    optional
        The value may be left out; it is then "".
    images
        The keyword of :func:`nbinfer.generate_image` that it fills, with ``--image-out``.
    rows
        Also goes with ``--over``.
    """

    name: str
    flags: tuple[str, ...]
    help: str
    kind: Kind = "text"
    metavar: str = ""
    keyword: str | None = None
    value: Any = True
    repeat: bool = False
    optional: bool = False
    images: str | None = None
    choices: tuple[str, ...] = ()
    completes: Completes = ""
    rows: bool = True


def _sampling(name: str, flags: tuple[str, ...], kind: Kind, text: str) -> Option:
    metavar = "N" if kind == "int" else "X"
    return Option(name=name, flags=flags, kind=kind, metavar=metavar, help=text, keyword=name)


def _image(
    name: str, flags: tuple[str, ...], kind: Kind, metavar: str, text: str, keyword: str | None = None
) -> Option:
    return Option(name=name, flags=flags, kind=kind, metavar=metavar, help=text, images=keyword or name)


INFER: tuple[Option, ...] = (
    Option(
        name="model",
        flags=("-m", "--model"),
        metavar="NAME",
        help="name or alias of a loaded model; else %config NbInfer.model, else the only one loaded",
        keyword="model",
        completes="model",
    ),
    Option(
        name="out",
        flags=("-o", "--out"),
        kind="name",
        metavar="NAME",
        help="variable for the Result; also set, with the partial text, after an interrupt or a failure",
    ),
    Option(name="system", flags=("-s", "--system"), metavar="TEXT", help="system prompt", keyword="system"),
    Option(
        name="system_var",
        flags=("--system-var",),
        metavar="NAME",
        help="variable that holds the system prompt",
        keyword="system",
        completes="variable",
    ),
    _sampling(
        "temperature", ("-t", "--temperature"), "float", "0 (default) takes the likeliest token; up to 5"
    ),
    _sampling("max_tokens", ("-n", "--max-tokens"), "int", "at most N tokens of answer"),
    _sampling(
        "top_p", ("--top-p",), "float", "sample from the likeliest tokens that make up this probability"
    ),
    _sampling("top_k", ("--top-k",), "int", "sample from the N likeliest tokens; 0 is off"),
    _sampling("min_p", ("--min-p",), "float", "drop tokens less likely than this part of the likeliest"),
    Option(
        name="seed",
        flags=("--seed",),
        kind="int",
        metavar="N",
        help="seed of the random choice",
        keyword="seed",
        images="seed",
    ),
    _sampling("repeat_penalty", ("--repeat-penalty",), "float", "penalty on repeating tokens; 1 is off"),
    _sampling("presence_penalty", ("--presence-penalty",), "float", "penalty on tokens that have occurred"),
    _sampling("frequency_penalty", ("--frequency-penalty",), "float", "penalty by how often they have"),
    Option(
        name="stop",
        flags=("--stop",),
        kind="escaped",
        metavar="TEXT",
        help=r"end the answer before this text; \n is a line end, \t a tab, \\ a backslash (repeatable)",
        keyword="stop",
        repeat=True,
    ),
    Option(
        name="logprobs",
        flags=("--logprobs",),
        kind="int",
        metavar="K",
        help="keep how likely each token was, and the K likeliest; r.show_logprobs() shows them",
        keyword="logprobs",
    ),
    Option(
        name="params",
        flags=("-p", "--param"),
        kind="pair",
        metavar="KEY=JSON",
        help="any further option of nbinfer.infer (repeatable)",
        keyword="params",
        repeat=True,
    ),
    Option(
        name="schema",
        flags=("--schema",),
        metavar="NAME",
        help="a pydantic class, dataclass, TypedDict or JSON Schema in a variable, or a .json file",
        keyword="schema",
        completes="variable",
    ),
    Option(
        name="choices",
        flags=("--choices",),
        kind="list",
        metavar="A,B,C",
        help="answer with one of these; or a variable that holds a list",
        keyword="choices",
        completes="variable",
    ),
    Option(name="regex", flags=("--regex",), metavar="R", help="answer matches R", keyword="regex"),
    Option(
        name="grammar",
        flags=("--grammar",),
        metavar="FILE",
        help="answer obeys the Lark or GBNF grammar in FILE",
        keyword="grammar",
        completes="path",
    ),
    Option(name="json", flags=("--json",), kind="flag", help="answer is a JSON object", keyword="json"),
    Option(
        name="chat",
        flags=("-c", "--chat"),
        metavar="NAME",
        help="continue the conversation NAME; in %infer a name is given as --chat=NAME",
        optional=True,
        rows=False,
    ),
    Option(name="new", flags=("--new",), kind="flag", help="begin the conversation anew", rows=False),
    Option(
        name="images",
        flags=("--image",),
        metavar="NAME",
        help="image for a vision model: a variable or a path (repeatable)",
        keyword="images",
        repeat=True,
        completes="path",
        rows=False,
    ),
    Option(
        name="image_out",
        flags=("--image-out",),
        metavar="FILE.png",
        help="make an image, and save it if a file is named; in %infer as --image-out=FILE.png",
        optional=True,
    ),
    _image("size", ("--size",), "text", "WxH", "pixels of the image, width first: 512x768"),
    _image("count", ("--count",), "int", "N", "so many images, of seeds that follow each other", "n"),
    _image("steps", ("--steps",), "int", "N", "denoising steps of the image"),
    _image("guidance", ("--guidance",), "float", "X", "how closely the image follows the prompt"),
    _image("negative", ("--negative",), "text", "TEXT", "what the image does not show", "negative_prompt"),
    Option(
        name="over",
        flags=("--over",),
        metavar="FRAME[.COL]",
        help="ask once per row of a DataFrame, list or Series; {column} in the body is the row's value",
        completes="variable",
    ),
    Option(
        name="think", flags=("--think",), kind="flag", help="let a reasoning model think", keyword="think"
    ),
    Option(
        name="think", flags=("--no-think",), kind="flag", value=False, help="do not let it", keyword="think"
    ),
    Option(
        name="reasoning_budget",
        flags=("--reasoning-budget",),
        kind="int",
        metavar="N",
        help="at most N tokens of reasoning; 0 none, -1 unlimited",
        keyword="reasoning_budget",
    ),
    Option(
        name="adapter",
        flags=("--adapter",),
        metavar="NAME",
        help="LoRA adapter that was loaded with the model",
        keyword="adapter",
    ),
    Option(
        name="no_template",
        flags=("--no-template",),
        kind="flag",
        help="send the text as it is, without the model's chat template",
        keyword="raw",
    ),
    Option(
        name="view",
        flags=("-f", "--format"),
        metavar="VIEW",
        help="how to show the answer; the Result always holds the raw text",
        choices=VIEWS,
        rows=False,
    ),
    Option(
        name="extract",
        flags=("-x", "--extract"),
        kind="flag",
        help="show the first fenced code block alone, as -f code",
        rows=False,
    ),
    Option(name="quiet", flags=("-q", "--quiet"), kind="flag", help="show nothing"),
    Option(
        name="no_stream",
        flags=("--no-stream",),
        kind="flag",
        help="show the answer once, at its end",
        rows=False,
    ),
    Option(name="raw", flags=("--raw",), kind="flag", help="take the text as it is: {{ }} stays"),
    Option(
        name="dry_run",
        flags=("--dry-run",),
        kind="flag",
        help="show the prompt as the model would get it, and its length; run nothing",
        rows=False,
    ),
    Option(name="help", flags=("-h", "--help"), kind="flag", help="show this"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A subcommand of ``%nbinfer``. ``words`` are its arguments, ``[…]`` for those that may be left out."""

    name: str
    help: str
    words: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    completes: Completes = ""


_HELP = Option(name="help", flags=("-h", "--help"), kind="flag", help="show this")
_CONTEXT = Option(
    name="context_size",
    flags=("-c", "--context-size"),
    kind="int",
    metavar="N",
    help="tokens of prompt and answer together; -1 is the trained maximum",
    keyword="context_size",
)
_GPU_LAYERS = Option(
    name="gpu_layers",
    flags=("--gpu-layers",),
    kind="int",
    metavar="N",
    help="layers on the GPU",
    keyword="gpu_layers",
)
_KV_TYPE = Option(
    name="kv_type",
    flags=("--kv-type",),
    metavar="TYPE",
    help="type of the KV cache: f16, q8_0…",
    keyword="kv_type",
)
_PARALLEL = Option(
    name="parallel",
    flags=("--parallel",),
    kind="int",
    metavar="N",
    help="sequences decoded at once",
    keyword="parallel",
)
_PARAM = Option(
    name="params",
    flags=("-p", "--param"),
    kind="pair",
    metavar="KEY=JSON",
    help="any further keyword of the Python function (repeatable)",
    repeat=True,
)

COMMANDS: tuple[Command, ...] = (
    Command(
        name="load",
        words=("REF",),
        completes="path",
        help="load a model: demo, an alias, a file, or a reference that `models` shows",
        options=(
            Option(name="name", flags=("--name",), metavar="NAME", help="call it NAME", keyword="name"),
            Option(
                name="mode",
                flags=("--mode",),
                metavar="MODE",
                help="completion, embedding, reranking or image-generation; default: what it is made for",
                keyword="mode",
                completes="mode",
            ),
            _CONTEXT,
            _GPU_LAYERS,
            _KV_TYPE,
            _PARALLEL,
            Option(
                name="speculative",
                flags=("--speculative",),
                metavar="DRAFT",
                optional=True,
                completes="path",
                help="guess tokens ahead, with the model DRAFT or from the prompt; the text stays what it is",
                keyword="speculative",
            ),
            Option(
                name="backend", flags=("--backend",), metavar="NAME", help="which backend", keyword="backend"
            ),
            Option(
                name="where",
                flags=("--where",),
                metavar="PLACE",
                help="in this process, or in one that outlives it",
                keyword="where",
                choices=("kernel", "sidecar"),
            ),
            Option(
                name="keep_alive",
                flags=("--keep-alive",),
                metavar="TIME",
                help="unload when idle this long: 5m, 1h30m; -1 never",
                keyword="keep_alive",
            ),
            Option(
                name="force",
                flags=("--force",),
                kind="flag",
                help="load although it is estimated not to fit",
                keyword="force",
            ),
            _PARAM,
            _HELP,
        ),
    ),
    Command(
        name="unload", words=("[NAME]",), completes="model", help="unload a model, or all", options=(_HELP,)
    ),
    Command(name="ps", help="the loaded models", options=(_HELP,)),
    Command(name="status", help="the backends: installed or not, and what to type", options=(_HELP,)),
    Command(name="models", help="the models on this machine", options=(_HELP,)),
    Command(
        name="estimate",
        words=("REF",),
        completes="path",
        help="the memory that a model will take, before it is loaded",
        options=(_CONTEXT, _GPU_LAYERS, _KV_TYPE, _PARALLEL, _PARAM, _HELP),
    ),
    Command(name="pull", words=("REF",), help="download a model", options=(_HELP,)),
    Command(
        name="panel",
        words=("[REF]",),
        completes="path",
        help="load and watch models with the mouse",
        options=(_HELP,),
    ),
    Command(
        name="alias",
        words=("[NAME]", "[REF]"),
        completes="path",
        help="list short names, or let NAME stand for REF",
        options=(
            Option(name="remove", flags=("--remove",), metavar="NAME", help="forget a short name"),
            _HELP,
        ),
    ),
    Command(name="config", help="the settings, their values and where they come from", options=(_HELP,)),
    Command(name="doctor", help="versions and health, for a report or a look", options=(_HELP,)),
    Command(name="reset", words=("[CHAT]",), help="forget a conversation, or all", options=(_HELP,)),
    Command(name="help", words=("[COMMAND]",), help="this, or the options of a command", options=(_HELP,)),
)


def flag_words(option: Option) -> str:
    """Return an option's flags as help shows them: ``-t, --temperature X``."""
    value = option.metavar if option.kind != "flag" else ""
    if option.optional:
        value = f"[{value}]"
    return f"{', '.join(option.flags)}{' ' if value else ''}{value}"


def describe(options: tuple[Option, ...]) -> list[tuple[str, str]]:
    """Return (flags, help) of each option."""
    rows = []
    for option in options:
        listed = f" ({', '.join(option.choices)})" if option.choices else ""
        rows.append((flag_words(option), option.help + listed))
    return rows


def _aligned(rows: list[tuple[str, str]]) -> str:
    # A narrow notebook and a terminal show a line of so many characters whole.
    width = max(len(left) for left, _ in rows)
    below = "\n" + " " * (width + 4)
    return "\n".join(
        f"  {left:<{width}}  {below.join(textwrap.wrap(right, 79 - width - 4, break_on_hyphens=False))}"
        for left, right in rows
    )


INFER_USAGE = """\
%infer [options] [--] PROMPT     the rest of the line is the prompt
%%infer [MODEL] [options]        the body is the prompt"""

_INFER_NOTE = r"""Single braces are literal, double braces are expressions: {{ expression }}
in the prompt, and in an option's value, is replaced by a value of this
notebook, unless --raw is given. \mathbf{{x}}, which may be LaTeX or a value, is
an error: --raw for the one, a space before {{ for the other. With --over,
{column} is the value of the row, and a brace that is meant is written twice in
the row's template."""


def infer_help() -> str:
    """Return the help of ``%infer`` and ``%%infer``."""
    return f"{INFER_USAGE}\n\nAsk a local model.\n\n{_aligned(describe(INFER))}\n\n{_INFER_NOTE}\n"


def command_help(command: Command) -> str:
    """Return the help of one subcommand."""
    usage = " ".join(("%nbinfer", command.name, *command.words))
    return (
        f"{usage}\n\n{command.help[0].upper()}{command.help[1:]}.\n\n{_aligned(describe(command.options))}\n"
    )


def nbinfer_help() -> str:
    """Return the help of ``%nbinfer``."""
    rows = [(" ".join((command.name, *command.words)), command.help) for command in COMMANDS]
    note = "{{ expression }} in a word is replaced by a value of this notebook."
    return f"%nbinfer COMMAND\n\nLoad, list and inspect local models.\n\n{_aligned(rows)}\n\n{note}\n"
