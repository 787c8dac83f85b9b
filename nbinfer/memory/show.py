"""An estimate as text for a terminal, and as bars for a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from nbinfer.contract.units import human_bytes

if TYPE_CHECKING:
    from nbinfer.memory.shown import Device, Shown

LABELS = {
    "weights": "weights",
    "cache": "KV cache",
    "state": "state",
    "compute": "compute",
    "output": "output",
    "projector": "image encoder",
    "draft": "draft model",
    "text_encoders": "text encoders",
    "denoiser": "denoiser",
    "vae": "VAE",
    "other": "other parts",
    "activations": "activations",
    "overhead": "overhead",
    "file_backed": "in the file",
}
# Told apart without colour as well: each segment's name and size stand in the legend, in the same order.
COLOURS = {
    "weights": "#3b76c4",
    "cache": "#c8741a",
    "state": "#8c6bb1",
    "compute": "#3f8f4f",
    "output": "#6d7f2a",
    "projector": "#b0508a",
    "draft": "#7a6a58",
    "text_encoders": "#c8741a",
    "denoiser": "#3b76c4",
    "vae": "#8c6bb1",
    "other": "#7a6a58",
    "activations": "#3f8f4f",
    "overhead": "#8a8a8a",
    "file_backed": "#7fa3d4",
}
_MARKS = {"fits": "✓", "tight": "!", "does not fit": "✗"}


def parts(device: Device) -> list[tuple[str, str, int]]:
    """(key, label, bytes) of what is on a device, in the order it is drawn; nothing that is empty."""
    rough = {"overhead": sum(device.overhead) // 2, "file_backed": getattr(device, "at_hand", 0)}
    rows = [
        # A device of a text model has no denoiser, one of an image model no cache.
        (key, label, rough[key] if key in rough else getattr(device, key, 0))
        for key, label in LABELS.items()
    ]
    return [row for row in rows if row[2]]


def text(estimate: Shown[Device]) -> str:
    """Lines for a terminal: the verdict, each device's parts, and what to change when it does not fit."""
    lines = [f"{_MARKS[estimate.verdict]} {estimate.model}: {estimate.reason}", f"  {estimate.asked}"]
    for device in estimate.devices:
        shown = parts(device)
        if not shown:
            continue
        head = f"{human_bytes(device.required)} of {human_bytes(device.available)} free"
        lines.append(f"  {device.name}: {head}")
        lines.append("    " + ", ".join(f"{label} {human_bytes(size)}" for _, label, size in shown))
    lines += [f"  try: {advice.text}" for advice in estimate.advice()]
    if estimate.note:
        lines.append(f"  note: {estimate.note}")
    return "\n".join(lines)


def html(estimate: Shown[Device]) -> str:
    """A stacked bar per device against what is free there; self-contained, legible in both themes."""
    bars = "".join(_bar(device) for device in estimate.devices if parts(device))
    advice = "".join(f"<li>{escape(a.text)}</li>" for a in estimate.advice())
    tries = f'<div class="nbinfer-est-more">It fits with:<ul>{advice}</ul></div>' if advice else ""
    note = f'<div class="nbinfer-est-more">{escape(estimate.note)}</div>' if estimate.note else ""
    verdict = estimate.verdict.replace(" ", "-")
    return (
        f'{_STYLE}<div class="nbinfer-est"><div><b>{escape(estimate.model)}</b> '
        f'<span class="nbinfer-est-{verdict}">{_MARKS[estimate.verdict]} {escape(estimate.reason)}'
        "</span></div>"
        f'<div class="nbinfer-est-more">{escape(estimate.asked)}</div>{bars}{tries}{note}</div>'
    )


def _bar(device: Device) -> str:
    shown = parts(device)
    whole = max(device.available, sum(size for _, _, size in shown), 1)
    segments = "".join(
        f'<i style="width:{100 * size / whole:.2f}%;background:{COLOURS[key]}" title="{escape(label)} '
        f'{human_bytes(size)}"></i>'
        for key, label, size in shown
    )
    edge = ""
    if device.available < whole:
        left = 100 * device.available / whole
        edge = f'<b style="left:{left:.2f}%" title="free {human_bytes(device.available)}"></b>'
    # The space is all that parts them where style sheets are dropped: in untrusted notebooks, on GitHub.
    legend = " ".join(
        f'<span><i style="background:{COLOURS[key]}"></i>{escape(label)} {human_bytes(size)}</span>'
        for key, label, size in shown
    )
    head = f"{escape(device.name)}: {human_bytes(device.required)} of {human_bytes(device.available)} free"
    return (
        f'<div class="nbinfer-est-head">{head}</div>'
        f'<div class="nbinfer-est-bar" role="img" aria-label="{head}">{segments}{edge}</div>'
        f'<div class="nbinfer-est-legend">{legend}</div>'
    )


# Text takes the colour of the page, whatever its theme or without one; a verdict is told by its mark and its
# word, and the colour stands in an edge, where no contrast is lost.
_STYLE = """<style>
.nbinfer-est{color:var(--jp-content-font-color1,inherit);max-width:46em;padding:4px 2px;
 font-family:var(--jp-ui-font-family,inherit);font-size:13px;line-height:1.5}
.nbinfer-est-more,.nbinfer-est-legend{font-size:12px;opacity:.85}
.nbinfer-est-more ul{margin:0 0 0 1.2em;padding:0}
.nbinfer-est-fits,.nbinfer-est-tight,.nbinfer-est-does-not-fit{border:1px solid #2f8a4c;border-left-width:5px;
 border-radius:3px;padding:0 6px}
.nbinfer-est-tight{border-color:#b8622b}
.nbinfer-est-does-not-fit{border-color:#cc4b4b}
.nbinfer-est-head{margin-top:6px}
.nbinfer-est-bar{position:relative;display:flex;height:14px;overflow:hidden;border-radius:3px;
 background:rgba(128,128,128,.25)}
.nbinfer-est-bar i{display:block;height:100%;box-shadow:inset -1px 0 rgba(255,255,255,.7)}
.nbinfer-est-bar b{position:absolute;top:0;bottom:0;width:2px;background:currentColor}
.nbinfer-est-legend span{margin-right:12px;white-space:nowrap}
.nbinfer-est-legend i{display:inline-block;width:9px;height:9px;margin-right:4px;border-radius:2px}
</style>"""
