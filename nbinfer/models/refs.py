"""The parts of a reference, and which of several files it means."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from nbinfer.contract.errors import ModelNotFound
from nbinfer.gguf.split import part_of
from nbinfer.models.files import is_projector, stem_and_quant

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMES: Final = {
    "hf": "huggingface",
    "ollama": "ollama",
    "lmstudio": "lmstudio",
    "docker": "docker",
    "llama.cpp": "llama.cpp",
    "download": "download",
}
"""The source that each scheme of a reference means."""

PREFERRED: Final = ("Q4_K_M", "UD-Q4_K_XL", "Q4_K_S", "Q4_0", "Q5_K_M", "Q6_K", "Q8_0")
"""Quantisations to take when none is asked for, best first."""

MAX_LISTED = 8
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*)"
_HF = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?P<file>(?:/[^/@:]+)+)?(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?(?::(?P<quant>[\w.-]+))?",
)
_HF_HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_HF_PATH = re.compile(
    r"/(?P<repo>[^/]+/[^/]+)(?:/(?:resolve|blob|tree|raw)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?/?"
)


@dataclass(frozen=True, slots=True)
class HubRef:
    """A model on the Hugging Face hub: a repository, and what of it."""

    repo: str
    file: str | None = None
    quant: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        at = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repo}{file}{at}" + (f":{self.quant}" if self.quant else "")


def hub_ref(text: str) -> HubRef:
    """Parse what follows ``hf:``: ``owner/repo``, with ``@revision`` and ``:quant``, or a file in it.

    Raises
    ------
    ModelNotFound
        It is no such reference.
    """
    match = _HF.fullmatch(text)
    if match is None or ".." in text:
        raise ModelNotFound(
            f"hf:{text} is no reference to a model on Hugging Face. It looks like\n"
            "hf:OWNER/REPO, hf:OWNER/REPO:Q4_K_M, hf:OWNER/REPO@REVISION or hf:OWNER/REPO/FILE.gguf.",
        )
    file = match["file"]
    return HubRef(match["repo"], file[1:] if file else None, match["quant"], match["revision"])


def hub_ref_of_address(url: str) -> HubRef | None:
    """Return the model on the hub that an address shows or downloads; None for any other address."""
    parts = urlsplit(url)
    match = _HF_PATH.fullmatch(unquote(parts.path))
    if parts.hostname not in _HF_HOSTS or match is None:
        return None
    file = match["file"]
    if file is not None and not file.lower().endswith(".gguf"):
        file = None
    revision = match["revision"]
    return HubRef(match["repo"], file, None, None if revision == "main" else revision)


def choose(files: Iterable[str], *, file: str | None, quant: str | None, where: str) -> str | None:
    """Choose one GGUF file of a repository.

    Parameters
    ----------
    files
        Names of all its files.
    file, quant
        What was asked for; neither: the preferred quantisation.
    where
        What to call the repository in messages.

    Returns
    -------
    str or None
        The file, of a split model the first part; None when there is no GGUF file, and none was asked for.

    Raises
    ------
    ModelNotFound
        What was asked for is not there; the message lists what is.
    """
    models = [
        name
        for name in sorted(files)
        if name.lower().endswith(".gguf")
        and not is_projector(name.rpartition("/")[2])
        and ((part := part_of(name)) is None or part.number == 1)
    ]
    if file is not None:
        part = part_of(file)
        first = part.sibling(1) if part else file
        if first in models:
            return first
        raise ModelNotFound(f"{where} has no file {file}.{nearest(file, models)}")
    quants = {name: stem_and_quant(name.rpartition("/")[2])[1] or "" for name in models}
    if quant is not None:
        fitting = [name for name in models if quants[name].lower() == quant.lower()]
        if fitting:
            return fitting[0]
        known = sorted({known for known in quants.values() if known})
        raise ModelNotFound(f"{where} has no {quant}. It has: {listed(known or models) or 'no GGUF files'}.")
    for preferred in PREFERRED:
        fitting = [name for name in models if quants[name] == preferred]
        if fitting:
            return fitting[0]
    return models[0] if models else None


def nearest(asked: str, names: Iterable[str], start: str = "the nearest names are") -> str:
    """Return a line with the names most like ``asked``; empty when there are no names."""
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(asked.lower(), by_lower, n=MAX_LISTED, cutoff=0.4)
    shown = [by_lower[name] for name in near] or sorted(by_lower.values())
    return f"\n{start[0].upper()}{start[1:]} {listed(shown)}." if shown else ""


def listed(names: Sequence[str]) -> str:
    """Return names with commas, the first few of many."""
    more = f", … ({len(names) - MAX_LISTED} more)" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
