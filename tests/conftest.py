"""What all tests start from."""

from __future__ import annotations

import importlib.util
import os
import signal
from contextlib import suppress

import pytest

pytest.register_assert_rewrite("support.conformance")

# Markers of tests that need a package which the main environment does not have, and that package.
_NEEDS = {"vllm": "vllm", "images": "diffusers"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an engine that is not installed; fail where that engine was required."""
    missing = {mark: package for mark, package in _NEEDS.items() if importlib.util.find_spec(package) is None}
    required = os.environ.get("NBINFER_REQUIRE", "").split(",")
    for item in items:
        for mark, package in missing.items():
            if item.get_closest_marker(mark) is None:
                continue
            if mark in required:
                raise pytest.UsageError(f"{item.nodeid} needs {package}, which is not installed.")
            reason = f"{package} is not installed here: make test-torch runs it in .venv-torch"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _demo_models() -> None:
    """The embedding model is on this disk, as after its first use; on a fresh machine it is made then."""
    from nbinfer.contract.errors import ModelNotFound
    from nbinfer.models.demo import demo_embed_path

    with suppress(ModelNotFound):
        demo_embed_path()


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Started in the background of a script, a process ignores SIGINT; tests send it to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
