"""The ``nbinfer`` command."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

app = typer.Typer(
    name="nbinfer",
    help="Local models for notebooks: what is here, what runs, and what memory it takes.",
    no_args_is_help=True,
    add_completion=False,
    # An error of ours is a few lines that say what to do; main() prints them.
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_STYLES = {"Running": "green", "Error": "red", "Not Installed": "yellow", "Installing": "cyan"}


def main() -> None:
    """Run the command line; an error that nbinfer raises on purpose is printed without a traceback."""
    from nbinfer.contract.errors import NbinferError
    from nbinfer.contract.rendering import printable

    try:
        app()
    except NbinferError as error:
        print(f"nbinfer: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:  # noqa: FBT001 - typer passes the option's value
    if wanted:
        from nbinfer._version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def status(*, as_json: AsJson = False) -> None:
    """Show every known backend, whether it can be used here, and how to install it."""
    from nbinfer import backends

    found = backends.statuses()
    if as_json:
        _print_json(
            [
                {"backend": name, "status": state.word.value, "detail": state.detail, "install": advice}
                for name, state, advice in found
            ],
        )
        return
    from rich.text import Text

    console = _console()
    words = [Text(state.word.value, style=_STYLES[state.word.value]) for _, state, _ in found]
    _print_table(
        console,
        ["backend", "status", "detail"],
        [[name, word, state.detail] for (name, state, _), word in zip(found, words, strict=True)],
    )
    for name, _, advice in found:
        # Not in the table: a command that is wrapped cannot be copied.
        if advice:
            console.print(f"{name}: {advice}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def models(*, as_json: AsJson = False) -> None:
    """Show the models on this disk."""
    session: Any = import_module("nbinfer.session")
    found = session.models()
    if not as_json and not found.empty:
        found = _for_a_screen(found)
    _print_frame(found, as_json=as_json, empty="No models were found on this disk.")


def _for_a_screen(found: pd.DataFrame) -> pd.DataFrame:
    """What fits into eighty columns; ``--json`` has everything."""
    from nbinfer.contract.units import human_bytes

    shown = found[["ref", "quantisation", "context", "modes"]].copy()
    shown.insert(1, "size", found["size_bytes"].map(human_bytes))
    if (found["problem"] != "").any():
        shown["problem"] = found["problem"]
    return shown


@app.command()
def pull(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="hf:owner/repo[:quant], or an address of a GGUF file.")
    ],
    *,
    force: Annotated[bool, typer.Option(help="Also when it will not fit into memory here.")] = False,
) -> None:
    """Download a model; says first what memory it will take."""
    session: Any = import_module("nbinfer.session")
    print(session.pull(ref, force=force).path)


@app.command()
def estimate(
    *,
    ref: Annotated[
        str,
        typer.Argument(metavar="REF", help="A model: a path, an alias, hf:owner/repo, ollama:name, demo, …"),
    ],
    ctx: Annotated[
        int | None, typer.Option("--ctx", help="Tokens of context; -1 is the trained maximum.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(help="Sequences decoded at once.")] = None,
    kv_type: Annotated[str | None, typer.Option(help="Type of the KV cache: f16, q8_0, q4_0, …")] = None,
    gpu_layers: Annotated[int | None, typer.Option(help="Layers on the GPU; all where there is one.")] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(help="Plan for a GPU of this memory, as 24GiB; several times for several."),
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Plan for this much main memory.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what memory a model takes, and whether it fits, before anything loads."""
    memory: Any = import_module("nbinfer.memory")
    options: dict[str, Any] = {"context_size": ctx, "parallel": parallel, "kv_type": kv_type}
    options |= {"gpu_layers": gpu_layers, "gpus": gpu or None, "ram": ram}
    found = memory.estimate(ref, **{name: value for name, value in options.items() if value is not None})
    if as_json:
        _print_json(found.to_dict())
    else:
        print(found)


@app.command()
def serve(
    *,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[REF]...", help="Models to load at once.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Listen on 127.0.0.1 too, with a token; 0 takes a free port.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="RAM that all models may take together, such as 8G.")
    ] = None,
    vram: Annotated[
        list[str] | None, typer.Option(help="Memory that they may take of each GPU; once per GPU.")
    ] = None,
    keep_alive: Annotated[
        str | None, typer.Option(help="How long an idle model stays: 5m, 1h30m, 0, or -1 for ever.")
    ] = None,
) -> None:
    """Run the sidecar until it is stopped: models for all notebooks, and an OpenAI API."""
    sidecar: Any = import_module("nbinfer.sidecar.commands")
    sidecar.serve(models or (), port=port, ram=ram, vram=vram or (), keep_alive=keep_alive)


@app.command()
def stop() -> None:
    """Stop the sidecar and every model in it."""
    discovery: Any = import_module("nbinfer.sidecar.discovery")
    print("The sidecar has stopped." if discovery.stop() else "No sidecar runs.")


@app.command()
def ps(*, as_json: AsJson = False) -> None:
    """Show the sidecar's models: what runs, who holds them, how long they stay."""
    if as_json:
        discovery: Any = import_module("nbinfer.sidecar.discovery")
        _print_json(discovery.describe())
        return
    sidecar: Any = import_module("nbinfer.sidecar.commands")
    rows = sidecar.rows()
    if rows:
        _print_table(_console(), list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
    else:
        print("The sidecar has no models." if sidecar.discovery.find() else "No sidecar runs.")


@app.command()
def doctor(*, as_json: AsJson = False) -> None:
    """Show versions and health: packages, memory, GPUs, backends, the sidecar."""
    session: Any = import_module("nbinfer.session")
    _print_frame(session.doctor(), as_json=as_json, empty="")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _console() -> Console:
    from rich.console import Console

    return Console()


def _print_frame(frame: pd.DataFrame, *, as_json: bool, empty: str) -> None:
    if as_json:
        # By way of pandas: it turns missing values into null, and numpy's numbers into numbers.
        _print_json(json.loads(frame.to_json(orient="records", date_format="iso", default_handler=str)))
    elif frame.empty:
        print(empty)
    else:
        rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
        _print_table(_console(), list(frame.columns), rows)


def _cell(value: Any) -> str:
    import pandas as pd

    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(str, value))
    return "" if pd.isna(value) else str(value)


def _print_table(console: Console, columns: list[str], rows: list[list[Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nbinfer.contract.rendering import printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # As Text: what a file or a model is called may look like markup, or hold what a terminal obeys.
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(str(cell))) for cell in row))
    console.print(table)
