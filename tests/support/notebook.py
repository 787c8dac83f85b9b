"""A shell to run cells in, in this process: as a notebook's (outputs are kept) or as a terminal's."""

from __future__ import annotations

import atexit
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from nbinfer.session import Model, session, settings, unload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbinfer.engines.protocol import Engine


class Notebook:
    """Runs cells; ``outputs`` are the display messages of the last one."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell

    def run(self, cell: str) -> Any:
        """Run a cell and return its value; an error is raised again."""
        self.shell.display_pub.outputs.clear()
        result = self.shell.run_cell(cell, store_history=True)
        result.raise_error()
        return result.result

    @property
    def outputs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.shell.display_pub.outputs
        return found

    @property
    def texts(self) -> list[str]:
        return [output["data"]["text/plain"] for output in self.outputs]

    def __getitem__(self, name: str) -> Any:
        return self.shell.user_ns[name]

    def set(self, **names: Any) -> None:
        """Put variables into the notebook."""
        self.shell.push(names)

    @staticmethod
    def add(engine: Engine, name: str = "fake") -> Model:
        """Load an engine as a model of the session."""
        model = Model(engine=engine, name=name, ref=f"{name}.gguf", backend="fake")
        session.add(model)
        return model


@contextmanager
def notebook(*, terminal: bool = False) -> Iterator[Notebook]:
    """Open a shell with the extension loaded; close it and unload every model at the end."""
    config = Config()
    config.HistoryManager.enabled = False
    shell: Any = InteractiveShell.instance(config=config)
    if not terminal:
        shell.kernel = object()  # what tells a notebook's shell from a terminal's
        shell.display_pub = CapturingDisplayPublisher()  # type: ignore[no-untyped-call]
    else:
        shell.display_pub.outputs = []
    try:
        shell.run_cell("%load_ext nbinfer").raise_error()
        yield Notebook(shell)
    finally:
        shell.run_cell("%unload_ext nbinfer")
        unload()
        session.aliases.clear()
        settings.model = None
        # Not its own way to exit, which collects garbage: half a second per test.
        atexit.unregister(shell.atexit_operations)
        shell.restore_sys_module_state()
        InteractiveShell.clear_instance()
