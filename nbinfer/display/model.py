"""A loaded model as a mimebundle: a small card with what it is and what it got."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbinfer.contract.memory import RequiredMemory
from nbinfer.contract.modes import Mode
from nbinfer.contract.units import human_bytes
from nbinfer.display.style import page
from nbinfer.display.text import escape, printable

if TYPE_CHECKING:
    from nbinfer.contract.rendering import Bundle
    from nbinfer.session import Model


def model_bundle(model: Model) -> Bundle:
    """Return (data, metadata) of a loaded model."""
    head = f"<strong>{escape(model.name)}</strong> "
    mode = f'<span class="nbinfer-badge nbinfer-ok">{escape(model.mode)}</span>'
    facts = f'<div class="nbinfer-foot">{escape(" · ".join(_facts(model)))}</div>'
    card = f'<div class="nbinfer-note nbinfer-ok">{head}{mode}{facts}</div>'
    return {"text/plain": printable(repr(model)), "text/html": page(card)}, {}


def _facts(model: Model) -> list[str]:
    info = model.info
    place = "in this kernel" if model.where == "kernel" else f"in a {model.where}"
    facts = [f"{info.version or model.backend} {place}", f"context {info.context_size:,} tokens"]
    if model.mode == Mode.IMAGE_GENERATION:
        uses = info.effective
        said = (uses.get("pipeline"), f"{uses.get('dtype')} on {uses.get('device')}", uses.get("size"))
        facts = [facts[0], *(str(word) for word in said if word)]
    if info.trained_context_size is not None and info.trained_context_size > info.context_size:
        facts[-1] += f" of {info.trained_context_size:,}"
    if info.dimensions is not None:
        facts.append(f"{info.dimensions} dimensions")
    if info.parallel > 1:
        facts.append(
            f"{info.parallel} {'images' if model.mode == Mode.IMAGE_GENERATION else 'requests'} at once"
        )
    facts += _memory_words(getattr(model.memory, "required", model.memory))
    return facts


def _memory_words(required: object) -> list[str]:
    if not isinstance(required, RequiredMemory):
        return []
    words = [f"{human_bytes(required.ram)} RAM"]
    for number, amount in enumerate(required.vram):
        label = "GPU" if len(required.vram) == 1 else f"GPU {number}"
        words.append(f"{human_bytes(amount)} {label}")
    return words
