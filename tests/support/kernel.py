"""A real Jupyter kernel, driven as a front end drives it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_client.manager import KernelManager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).parents[1]

# Waiting never decides a test: a kernel that is not done by then is stuck.
_PATIENCE = 60.0

WITH_FAKE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from support.fake_engine import HANG, FakeEngine
from nbinfer.session import Model, session
engine = FakeEngine()
session.add(Model(engine=engine, name="fake", ref="fake", backend="fake"))
%load_ext nbinfer
"""


@dataclass
class Ran:
    """What one cell sent: the reply, and the messages in order."""

    reply: dict[str, Any] = field(default_factory=dict)
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the contents of all messages of these types."""
        return [content for kind, content in self.messages if kind in kinds]

    @property
    def shown(self) -> list[str]:
        """The plain text of each display and update."""
        return [c["data"]["text/plain"] for c in self.of("display_data", "update_display_data")]

    @property
    def printed(self) -> str:
        return "".join(content["text"] for content in self.of("stream"))

    @property
    def error_text(self) -> str:
        """What a person sees of an error."""
        traces = ["\n".join(content["traceback"]) for content in self.of("error")]
        return "\n".join([*traces, *(c["text"] for c in self.of("stream") if c["name"] == "stderr")]).strip()


class Kernel:
    """Runs cells."""

    def __init__(self, manager: KernelManager, client: Any) -> None:
        self.manager = manager
        self.client = client

    def run(self, code: str, *, on_message: Callable[[str, dict[str, Any]], None] | None = None) -> Ran:
        """Run a cell to its end; ``on_message`` sees each message as it arrives."""
        ran = Ran()
        sent = self.client.execute(code)
        deadline = time.monotonic() + _PATIENCE
        while True:
            message = self.client.get_iopub_msg(timeout=deadline - time.monotonic())
            if message["parent_header"].get("msg_id") != sent:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            ran.messages.append((kind, content))
            if on_message is not None:
                on_message(kind, content)
        while not ran.reply:
            reply = self.client.get_shell_msg(timeout=deadline - time.monotonic())
            if reply["parent_header"].get("msg_id") == sent:
                ran.reply = reply["content"]
        return ran

    def value(self, expression: str) -> str:
        """Return the repr of an expression."""
        ran = self.run(f"print(repr({expression}))")
        assert ran.reply["status"] == "ok", ran.error_text
        return ran.printed.strip()

    def complete(self, code: str) -> list[str]:
        """Return what Tab offers at the end of ``code``."""
        sent = self.client.complete(code, len(code))
        while True:
            reply = self.client.get_shell_msg(timeout=_PATIENCE)
            if reply["parent_header"].get("msg_id") == sent:
                matches: list[str] = reply["content"]["matches"]
                return matches


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    """Start a kernel in ``folder`` and end it."""
    manager = KernelManager(kernel_name="python3", transport="ipc", ip=str(folder / "k"))
    manager.start_kernel(cwd=str(folder))
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=_PATIENCE)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
