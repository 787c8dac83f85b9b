"""llama-cpp-python's own ``Llama``, as the independent reference of what a model answers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def plain_llama(path: Path, **options: Any) -> Iterator[Any]:
    """Yield ``Llama(path, **options)``, quiet and on one thread unless told otherwise.

    Weights stay as they are in the file: builds of GCC 12 with AMX crash on the repacked ones, and ``Llama``
    has no option of its own to say so.
    """
    import llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def as_stored() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    with mock.patch("llama_cpp.llama_cpp.llama_model_default_params", as_stored):
        model = llama_cpp.Llama(
            str(path), **{"n_threads": 1, "n_threads_batch": 1, "verbose": False, **options}
        )
    try:
        yield model
    finally:
        model.close()
