"""The child process: one JSON request a line on stdin, one JSON answer a line on stdout.

Requests
--------
``{"op": "header", "header": base64, "size": bytes}``
    Take a GGUF header; the file's data are not needed, only their size.
``{"op": "measure", "devices": [...], "model": {...}, "context": {...}}``
    Plan that model with those settings. The model stays open, so the next context costs only the context.
``{"op": "devices"}``
    What ggml itself sees on this machine.

Every answer has ``ok``; a refusal by llama.cpp is ``ok: false`` with its own words. A header that trips one
of llama.cpp's assertions ends this process: that is why it is one.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import struct
import sys
import tempfile
from typing import Any

from nbinfer.memory.probe import abi
from nbinfer.memory.probe.pretend import Pretender
from nbinfer.processor import amx

_WARNING_LEVEL = 3
_MIB = 1 << 20


class Refused(Exception):  # noqa: N818 - llama.cpp's answer, not a failure of the probe
    """llama.cpp will not load this model or make this context."""


class Worker:
    """Holds the library, the header file, the open model and the pretend devices."""

    def __init__(self, library_folder: str) -> None:
        self.library = abi.bind(ctypes.CDLL(str(abi.library_path(library_folder))))
        self.breakdown = abi.breakdown_function(self.library)
        self.log: list[tuple[int, str]] = []
        self._on_log = abi.LogCallback(self._collect)
        self.library.llama_log_set(self._on_log, None)
        self.library.llama_backend_init()
        self._may_rearrange = amx.may_rearrange(self.library)
        self._untiled = {amx.BATCHED: amx.plain_layout(self.library)} if amx.uses(self.library) else {}
        self.pretender = Pretender(self.library)
        self._file: Any = None
        self._path = ""
        self._model: int | None = None
        self._model_key = ""
        self._keep: list[Any] = []

    def _collect(self, level: int, text: bytes, _: object) -> None:
        self.log.append((level, text.decode(errors="replace").rstrip()))

    def _words(self) -> str:
        """Return what llama.cpp said went wrong: its last few warnings and errors."""
        said = [text for level, text in self.log if level >= _WARNING_LEVEL and text]
        return "; ".join(said[-3:]) or "no reason given"

    # -- requests ----------------------------------------------------------------------------------------

    def take_header(self, header: bytes, size: int) -> None:
        """Make a file that has this header and, without using any memory, this size."""
        self._close_model()
        if self._file is not None:
            self._file.close()
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("header"), "wb")
            self._path = f"/proc/self/fd/{self._file.fileno()}"
        else:  # pragma: no cover - other systems than Linux
            self._file = tempfile.NamedTemporaryFile(suffix=".gguf")  # noqa: SIM115 - held open on purpose
            self._path = self._file.name
        self._file.write(header)
        self._file.flush()
        self._file.truncate(max(size, len(header)))

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Plan a context and return what it holds per buffer type, and the numbers llama.cpp settled on."""
        self.log.clear()
        self._open_model(request["devices"], request["model"])
        params = self.library.llama_context_default_params()
        for name, value in request["context"].items():
            setattr(params, name, value)
        self.log.clear()
        context = self.library.llama_init_from_model(self._model, params)
        if not context:
            raise Refused(self._words())
        try:
            rows = abi.read_breakdown(self.library, self.breakdown, context)
            return {
                "rows": rows,
                "n_ctx": self.library.llama_n_ctx(context),
                "n_ctx_seq": self.library.llama_n_ctx_seq(context),
                "n_batch": self.library.llama_n_batch(context),
                "n_ubatch": self.library.llama_n_ubatch(context),
                "n_seq_max": self.library.llama_n_seq_max(context),
                "flash_attention": self._flash_attention(params.flash_attn_type),
            }
        finally:
            self.library.llama_free(context)

    def _flash_attention(self, asked: int) -> bool:
        if asked >= 0:
            return asked > 0
        return not any("Flash Attention not supported" in text for _, text in self.log)

    def devices(self) -> list[dict[str, Any]]:
        """Return ggml's own devices: name, description, type, free and total bytes."""
        found = []
        for index in range(self.library.ggml_backend_dev_count()):
            device = self.library.ggml_backend_dev_get(index)
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            self.library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            found.append(
                {
                    "name": self.library.ggml_backend_dev_name(device).decode(),
                    "description": self.library.ggml_backend_dev_description(device).decode(),
                    "type": self.library.ggml_backend_dev_type(device),
                    "free": free.value,
                    "total": total.value,
                }
            )
        return found

    # -- the model ---------------------------------------------------------------------------------------

    def _close_model(self) -> None:
        if self._model:
            self.library.llama_model_free(self._model)
        self._model, self._model_key, self._keep = None, "", []

    def _open_model(self, devices: list[dict[str, Any]], model: dict[str, Any]) -> None:
        key = json.dumps([devices, model], sort_keys=True)
        if self._model and key == self._model_key:
            return
        self._close_model()
        if self._file is None:
            raise Refused("no header was given")
        params = self.library.llama_model_default_params()
        params.no_alloc = True
        params.load_mode = abi.LOAD_MODE_NONE
        params.use_extra_bufts = self._may_rearrange
        fields = dict(model)
        main_memory = self.library.ggml_backend_cpu_buffer_type()
        overrides = dict.fromkeys(fields.pop("experts_on_cpu", []), main_memory)
        if not devices:
            overrides |= self._untiled
        split = fields.pop("tensor_split", None)
        for name, value in fields.items():
            setattr(params, name, value)
        addresses = [self.pretender.device(**device) for device in devices]
        self.pretender.plan_for(len(addresses))
        # An empty list, not an absent one: then no device of this machine is used either.
        listed = (ctypes.c_void_p * (len(addresses) + 1))(*addresses, None)
        params.devices = ctypes.addressof(listed)
        self._keep = [listed]
        if split:
            shares = (ctypes.c_float * 128)(*split)
            params.tensor_split = ctypes.addressof(shares)
            self._keep.append(shares)
        if overrides:
            rules = abi.buffer_overrides(overrides)
            params.tensor_buft_overrides = ctypes.addressof(rules)
            self._keep.append(rules)
        self._model = self.library.llama_model_load_from_file(self._path.encode(), params)
        if not self._model:
            raise Refused(self._words())
        self._model_key = key

    # -- trust -------------------------------------------------------------------------------------------

    def self_test(self) -> str:
        """Return why this build of llama.cpp cannot be used, or an empty string.

        The structures are read back where they hold known values, and a tiny model is planned whose weights
        and cache are known to the byte, on the CPU and split over two pretend devices.
        """
        if self.breakdown is None:
            return "this build does not export its memory breakdown"
        context = self.library.llama_context_default_params()
        if (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max) != (512, 2048, 512, 1):
            return "the context parameters have another layout"
        model = self.library.llama_model_default_params()
        if (
            not model.use_extra_bufts
            or model.no_alloc
            or model.vocab_only
            or model.load_mode not in (-1, 0, 1)
        ):
            return "the model parameters have another layout"
        try:
            self.take_header(*_tiny_header())
            on_cpu = self.measure({"devices": [], "model": {}, "context": {"n_ctx": 256}})
            gpu = {"name": "CUDA0", "description": "self-test", "free": 1 << 30, "total": 1 << 30}
            on_gpu = self.measure(
                {
                    "devices": [{**gpu, "integrated": False}, {**gpu, "name": "CUDA1", "integrated": False}],
                    "model": {"n_gpu_layers": 2},
                    "context": {"n_ctx": 256},
                }
            )
        except (Refused, ValueError, OSError) as error:
            return f"the self-test failed: {error}"
        finally:
            self._close_model()
        got = [_weights_and_cache(answer["rows"]) for answer in (on_cpu, on_gpu)]
        if got != _TINY_EXPECTED:
            return f"the self-test measured {got} where {_TINY_EXPECTED} is right"
        if not all(row["compute"] > 0 for row in on_gpu["rows"] if row["device"] == "CUDA1"):
            return "the self-test measured no compute memory on the pretend device"
        return ""


def _weights_and_cache(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in rows:
        device = "CPU" if row["host"] else row["device"]
        model, context = found.get(device, (0, 0))
        found[device] = [model + row["model"], context + row["context"]]
    return {device: sums for device, sums in found.items() if any(sums)}


# A llama of 2 layers, width 64, 2 heads of 32 over 1 key head, feed-forward 128, 96 tokens, all F32:
# embedding 24576, output 24576 + norm 256; a layer: 2 norms 512, q and o 32768, k and v 16384, ffn 98304.
# The cache: 256 cells x 32 x 2 (keys, values) x 2 bytes (f16) x layers.
_TINY_LAYER = 512 + 32768 + 16384 + 98304
_TINY_EXPECTED = [
    {"CPU": [24576 + 24832 + 2 * _TINY_LAYER, 2 * 32768]},
    # Two of three layers, the output counted as one: block 1 on the first device, the output on the second.
    {"CPU": [24576 + _TINY_LAYER, 32768], "CUDA0": [_TINY_LAYER, 32768], "CUDA1": [24832, 0]},
]


def _tiny_header() -> tuple[bytes, int]:
    """Return the self-test's model as a GGUF header, and the size its file would have."""
    width, inner, keys, vocabulary, blocks = 64, 128, 32, 96, 2

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def number(key: str, value: int) -> bytes:
        return text(key) + struct.pack("<II", 4, value)

    def words(key: str, value: str) -> bytes:
        return text(key) + struct.pack("<I", 8) + text(value)

    fields = [
        words("general.architecture", "llama"),
        words("tokenizer.ggml.model", "no_vocab"),
        number("llama.vocab_size", vocabulary),
        number("llama.block_count", blocks),
        number("llama.context_length", 256),
        number("llama.embedding_length", width),
        number("llama.feed_forward_length", inner),
        number("llama.attention.head_count", 2),
        number("llama.attention.head_count_kv", 1),
        text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5),
    ]
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (width, vocabulary)),
        ("output_norm.weight", (width,)),
        ("output.weight", (width, vocabulary)),
    ]
    for block in range(blocks):
        shapes += [
            (f"blk.{block}.{name}.weight", shape)
            for name, shape in (
                ("attn_norm", (width,)),
                ("attn_q", (width, width)),
                ("attn_k", (width, keys)),
                ("attn_v", (width, keys)),
                ("attn_output", (width, width)),
                ("ffn_norm", (width,)),
                ("ffn_gate", (width, inner)),
                ("ffn_up", (width, inner)),
                ("ffn_down", (inner, width)),
            )
        ]
    tensors, offset = b"", 0
    for name, shape in shapes:
        tensors += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        size = 4
        for length in shape:
            size *= length
        offset += (size + 31) // 32 * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(fields)) + b"".join(fields) + tensors
    header += bytes(-len(header) % 32)
    return header, len(header) + offset


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    operation = request.get("op")
    try:
        if operation == "header":
            worker.take_header(base64.b64decode(request["header"]), request["size"])
            return {"ok": True}
        if operation == "measure":
            return {"ok": True, **worker.measure(request)}
        if operation == "devices":
            return {"ok": True, "devices": worker.devices()}
    except Refused as refusal:
        return {"ok": False, "refused": True, "why": str(refusal)}
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        return {"ok": False, "refused": False, "why": f"{type(error).__name__}: {error}"}
    return {"ok": False, "refused": False, "why": f"unknown operation {operation!r}"}


def _limit(address_space: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(library_folder: str, address_space: int) -> None:
    """Serve requests until stdin closes; the first line written says whether this build can be trusted.

    Parameters
    ----------
    library_folder
        Where llama's library lies.
    address_space
        The most bytes of address space that this process may use.
    """
    _limit(address_space)
    # llama.cpp and its backends may print: keep the answers apart from that.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        worker = Worker(library_folder)
        problem = worker.self_test()
    except (OSError, AttributeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
    say({"ready": not problem, "why": problem})
    if problem:
        return
    for line in sys.stdin.buffer:
        say(_answer(worker, json.loads(line)))
