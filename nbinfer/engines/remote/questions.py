"""Small questions to a server that has no engine yet: whether it is there, and what it serves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import BackendUnavailable, NbinferError
from nbinfer.engines.remote.clients import ConnectionLostError, OpenAIClient
from nbinfer.engines.remote.loop import LOOP
from nbinfer.engines.remote.wire import DENIED, NO_ANSWER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbinfer.engines.remote.clients import Endpoint


def list_models(endpoint: Endpoint, *, timeout: float) -> list[dict[str, Any]]:
    """Return the models that a server lists, as it describes them.

    Raises
    ------
    BackendUnavailable
        It does not answer, not in ``timeout`` seconds, or wants another key.
    NbinferError
        What it answers instead.
    """
    found = fetch_json(endpoint, "/v1/models", timeout=timeout)
    data = found.get("data") if isinstance(found, dict) else None
    return [each for each in data or () if isinstance(each, dict)]


def fetch_json(
    endpoint: Endpoint, path: str, body: Mapping[str, Any] | None = None, *, timeout: float
) -> Any:
    """Return what a server answers to a small request: GET, or with a body POST.

    Raises
    ------
    BackendUnavailable
        It does not answer, or not in ``timeout`` seconds: its code is ``NO_ANSWER``. Or it wants another
        key.
    NbinferError
        What it answers instead.
    """

    async def ask() -> Any:
        client = OpenAIClient(endpoint)
        try:
            async with asyncio.timeout(timeout):
                return await (client.get(path) if body is None else client.post(path, body))
        finally:
            await client.close()

    try:
        return asyncio.run_coroutine_threadsafe(ask(), LOOP.get()).result()
    except NbinferError as error:
        if getattr(error, "code", None) != DENIED:
            error.add_note(f"({endpoint.base_url} answered {path} with this.)")
            raise
        raise BackendUnavailable(
            f"{endpoint.base_url} refuses to answer {path}: {error!s:.200}\n"
            "Check api_key, or pass check=False."
        ) from None
    except (ConnectionLostError, TimeoutError) as error:
        absent = BackendUnavailable(
            f"no server answers at {endpoint.base_url} ({str(error) or 'it took too long':.200}).\n"
            "Start it, or check base_url."
        )
        absent.code = NO_ANSWER  # type: ignore[attr-defined]
        raise absent from None
