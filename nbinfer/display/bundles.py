"""From any value of ours to its mimebundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.contract.results import ImageResult, Logprobs, Result

if TYPE_CHECKING:
    from nbinfer.contract.rendering import Bundle


def mimebundle(value: Any) -> Bundle:
    """Return (data, metadata) for a value of ours, a DataFrame or a list of row dicts; else plain text.

    This is the renderer to hand to :func:`nbinfer.contract.rendering.register`.
    """
    if isinstance(value, Result):
        from nbinfer.display.result import result_bundle

        return result_bundle(value)
    if isinstance(value, Logprobs):
        from nbinfer.display.logprobs import logprobs_bundle

        return logprobs_bundle(value)
    if isinstance(value, ImageResult):
        from nbinfer.display.images import image_bundle

        return image_bundle(value)
    from nbinfer.session import Model

    if isinstance(value, Model):
        from nbinfer.display.model import model_bundle

        return model_bundle(value)
    from nbinfer.display.frame import badges_html, frame_bundle
    from nbinfer.display.text import printable
    from nbinfer.tables import ImageFrame

    if isinstance(value, ImageFrame):
        from nbinfer.display.images import image_frame_bundle

        return image_frame_bundle(value)
    if hasattr(value, "columns") and hasattr(value, "to_dict"):
        return frame_bundle(value)
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return {"text/plain": printable(str(value)), "text/html": badges_html(value)}, {}
    return {"text/plain": printable(str(value))}, {}
