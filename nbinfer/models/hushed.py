"""Other libraries' progress bars and advice, kept to themselves while a pipeline is made or loaded."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def hushed() -> Iterator[None]:
    """Have transformers and diffusers say only what is an error; their settings come back afterwards."""
    import warnings

    with warnings.catch_warnings():
        # tqdm says at its import that a notebook has no widgets; nothing here draws any.
        warnings.filterwarnings("ignore", message="IProgress not found")
        with _levels():
            yield


@contextmanager
def _levels() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        # Only now: importing diffusers makes transformers speak.
        from diffusers.utils import logging as diffusers_logging

        own, own_bars = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        try:
            yield
        finally:
            diffusers_logging.set_verbosity(own)
            if own_bars:
                diffusers_logging.enable_progress_bar()
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
