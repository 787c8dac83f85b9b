"""From what a pipeline gives to PNG files: the finished images with their settings in them, and previews."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

PREVIEW_CELLS = 16
"""Latent cells of a preview's longer side: 128 pixels with most VAEs, at little cost."""


def png(image: Any, params: Mapping[str, Any]) -> bytes:
    """Return a PIL image as a PNG file that says how it was made.

    ``parameters`` is the text that programs for such images read; ``nbinfer`` is ``params`` as JSON.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("parameters", words(params))
    info.add_itxt("nbinfer", json.dumps(dict(params), sort_keys=True, ensure_ascii=False))
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def words(params: Mapping[str, Any]) -> str:
    """Return settings in the customary form: the prompt, the negative one, and a line of the rest."""
    lines = [str(params.get("prompt", ""))]
    if params.get("negative_prompt"):
        lines.append(f"Negative prompt: {params['negative_prompt']}")
    rest = {
        "Steps": params.get("steps"),
        "Sampler": params.get("scheduler"),
        "CFG scale": params.get("guidance"),
        "Seed": params.get("seed"),
        "Size": params.get("size"),
        "Model": params.get("model"),
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in rest.items() if value is not None))
    return "\n".join(lines)


def preview(pipeline: Any, latents: Any) -> bytes | None:
    """Return a small PNG of an image on its way; None where the pipeline's latents cannot be read so.

    The latents are shrunk before they are decoded, so that it costs a few per cent of a step.
    """
    import torch

    vae: Any = getattr(pipeline, "vae", None)
    factor = getattr(getattr(vae, "config", None), "scaling_factor", None)
    flat = 4  # images, channels, height, width: what some transformers pack otherwise
    if factor is None or latents.ndim != flat or latents.shape[1] != vae.config.latent_channels:
        return None
    height, width = latents.shape[-2:]
    shrink = max(height, width) / PREVIEW_CELLS
    small = latents[:1].float()
    if shrink > 1:
        size = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        small = torch.nn.functional.interpolate(small, size=size, mode="area")
    small = small / factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    with torch.no_grad():
        decoded = vae.decode(small.to(vae.dtype), return_dict=False)[0]
    image = pipeline.image_processor.postprocess(decoded.float().nan_to_num(), output_type="pil")[0]
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
