"""The exact answer: llama.cpp itself, asked in a child process without weights and without a GPU."""

from __future__ import annotations

from nbinfer.memory.probe.client import (
    BufferRow,
    Measurement,
    PretendGPU,
    Probe,
    ProbeFailed,
    ProbeRefused,
    ProbeUnavailable,
    library_folder,
    shared_probe,
)

__all__ = [
    "BufferRow",
    "Measurement",
    "PretendGPU",
    "Probe",
    "ProbeFailed",
    "ProbeRefused",
    "ProbeUnavailable",
    "library_folder",
    "shared_probe",
]
