"""Memory: what there is, what a model will take, and whether it fits, before anything is loaded."""

from __future__ import annotations

from nbinfer.memory.estimate import DeviceEstimate, Estimate, estimate
from nbinfer.memory.exact import CannotEstimate
from nbinfer.memory.images import ImageEstimate, estimate_images
from nbinfer.memory.live import breakdown
from nbinfer.memory.machine import Gpu, Machine, Ram, machine
from nbinfer.memory.shown import Advice
from nbinfer.memory.vllm import VllmEstimate, estimate_vllm

__all__ = [
    "Advice",
    "CannotEstimate",
    "DeviceEstimate",
    "Estimate",
    "Gpu",
    "ImageEstimate",
    "Machine",
    "Ram",
    "VllmEstimate",
    "breakdown",
    "estimate",
    "estimate_images",
    "estimate_vllm",
    "machine",
]
