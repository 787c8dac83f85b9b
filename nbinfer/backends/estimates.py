"""What a load takes, by the kind of its files: one answer for the kernel, the sidecar and a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

from nbinfer.contract.errors import NotSupported
from nbinfer.memory import CannotEstimate, estimate, estimate_images
from nbinfer.memory.defaults import ESTIMATED, IMAGES_ESTIMATED
from nbinfer.memory.estimate import Estimate
from nbinfer.memory.images import ImageEstimate
from nbinfer.memory.vllm import VllmEstimate

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nbinfer.contract.modes import Mode
    from nbinfer.gguf import Header
    from nbinfer.gguf.pipeline import PipelineHeader
    from nbinfer.gguf.safetensors import SafetensorsHeader
    from nbinfer.models import ResolvedModel

LoadEstimate: TypeAlias = Estimate | ImageEstimate | VllmEstimate


def estimate_load(
    files: ResolvedModel,
    mode: Mode,
    options: Mapping[str, Any],
    *,
    draft: Path | str | None = None,
    exact: bool | None = None,
) -> LoadEstimate:
    """Estimate what a model takes when it is loaded with some options; loads nothing.

    Parameters
    ----------
    files
        The model, found.
    mode
        What it is loaded for.
    options
        Those of the load; what takes no memory, and what is None, counts nothing.
    draft
        The file of a draft model that is loaded with it.
    exact
        Whether llama.cpp itself is asked; see :func:`nbinfer.estimate`.

    Raises
    ------
    CannotEstimate
        The formulas do not know this kind of file.
    NbinferError
        A setting is refused, or a header cannot be read.
    """
    asked = {name: value for name, value in options.items() if value is not None}
    if files.format == "diffusers":
        given = {name: asked[name] for name in IMAGES_ESTIMATED if name in asked}
        return estimate_images(cast("PipelineHeader", files.header), name=files.name, **given)
    if files.format == "safetensors":
        return _under_vllm(files, asked)
    if files.format != "gguf":
        raise CannotEstimate(f"{files.name}: nothing here estimates {files.format} files.")
    given = {name: asked[name] for name in ESTIMATED if name in asked}
    if asked.get("exact"):  # one request at a time
        given["parallel"] = 1
    return estimate(cast("Header", files.header), mode=mode, exact=exact, draft=draft, **given)


def _under_vllm(files: ResolvedModel, asked: Mapping[str, Any]) -> VllmEstimate:
    from nbinfer.engines.vllm.build import installed
    from nbinfer.memory.vllm import estimate_load as of_vllm

    build = installed()
    known = {} if build is None else {"device": build.device}
    try:
        return of_vllm(cast("SafetensorsHeader", files.header), name=files.name, **{**asked, **known})
    except NotSupported as error:  # its configuration lacks what the formulas need
        raise CannotEstimate(str(error)) from error
