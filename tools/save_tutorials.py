"""Run the tutorials and save them with their outputs, as they are committed.

    python tools/save_tutorials.py                               # all of notebooks/
    python tools/save_tutorials.py notebooks/02-will-it-fit.ipynb

What is saved can be read where no kernel is: the still picture that each widget has beside it, and no widget
state, which is dead without its kernel and which code hosts refuse; no times of execution; no version of
Python. A tutorial that fails, or whose outputs name a folder of this machine, is not saved.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"/(?:home|Users|tmp|var|work|root|opt|mnt|srv)/\w|[A-Z]:\\\\|file://")
"""A folder of somebody's machine, which says too much and means nothing elsewhere."""
PICTURE = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+")


def clean(notebook: Any) -> Any:
    """Take out of an executed notebook what belongs to this run and not to its reader."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if WIDGET in data and "text/html" in data:
                del data[WIDGET]
    return notebook


def machine_paths(notebook: Any) -> list[str]:
    """Return what outputs and sources say of a machine's folders."""
    found = []
    for cell in notebook.cells:
        texts = [cell.source]
        for output in cell.get("outputs", ()):
            texts.append(output.get("text", ""))
            texts += [str(value) for kind, value in output.get("data", {}).items() if kind != "image/png"]
            texts += output.get("traceback", ())
        # A picture's bytes may spell anything.
        texts = [PICTURE.sub("", text) for text in texts]
        found += [text[m.start() : m.start() + 60] for text in texts if (m := MACHINE_PATH.search(text))]
    return found


def save(path: Path) -> None:
    notebook: Any = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # what a tutorial writes beside itself stays out of the tree
        NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],
        ).execute()
    clean(notebook)
    told = machine_paths(notebook)
    if told:
        raise SystemExit(f"{path.name} names folders of this machine: {told}")
    nbformat.write(notebook, path)  # type: ignore[no-untyped-call]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tutorials and save them with their outputs.")
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(NOTEBOOKS.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        print(path.name, file=sys.stderr, flush=True)
        save(path)


if __name__ == "__main__":
    main()
