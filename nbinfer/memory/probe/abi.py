"""The few C structures and functions of llama.cpp that the probe needs, bound by hand.

Only the standard library is imported: the probe's child process starts in tens of milliseconds because it
never imports llama_cpp (numpy, jinja2 and 200 ms with it). The layouts follow ``llama.h`` and
``ggml-backend-impl.h`` of ggml 0.25; the second is private and may change with any release, which is why
nothing here is trusted before ``worker.self_test`` has passed. A unit test compares the two parameter
structures with llama-cpp-python's own, field by field.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping
    from ctypes import Array

# ggml_backend_dev_type
DEVICE_CPU, DEVICE_GPU, DEVICE_IGPU = 0, 1, 2
# llama_load_mode, llama_split_mode
LOAD_MODE_NONE = 0
SPLIT_MODE_NONE, SPLIT_MODE_LAYER = 0, 1
# ggml_type of an F16 element, and the op codes the pretend device looks at
TYPE_F16 = 1

BREAKDOWN_SYMBOLS = (
    "llama_get_memory_breakdown",
    "_Z26llama_get_memory_breakdownPK13llama_context",
)


class ModelParams(Structure):
    """``llama_model_params``."""

    _fields_: ClassVar = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParams(Structure):
    """``llama_context_params``."""

    _fields_: ClassVar = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class BufferOverride(Structure):
    """``llama_model_tensor_buft_override``: tensors whose name matches go to one buffer type."""

    _fields_: ClassVar = [("pattern", c_char_p), ("buffer_type", c_void_p)]


def buffer_overrides(places: Mapping[str, int]) -> Array[BufferOverride]:
    """Return the list for ``tensor_buft_overrides``; it must live until the model is loaded.

    ``places`` are buffer types by the pattern of the tensors that go there.
    """
    rules = (BufferOverride * (len(places) + 1))()  # the last one, empty, ends it
    for rule, (pattern, buffer_type) in zip(rules, places.items(), strict=False):
        rule.pattern, rule.buffer_type = pattern.encode(), buffer_type
    return rules


class Tensor(Structure):
    """The head of ``ggml_tensor``, up to what the pretend device reads."""

    _fields_: ClassVar = [
        ("type", c_int32),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int32),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
    ]


class BufferType(Structure):
    """``ggml_backend_buffer_type`` with its interface inlined; every callback is a plain address."""

    _fields_: ClassVar = [
        ("get_name", c_void_p),
        ("alloc_buffer", c_void_p),
        ("get_alignment", c_void_p),
        ("get_max_size", c_void_p),
        ("get_alloc_size", c_void_p),
        ("is_host", c_void_p),
        ("device", c_void_p),
        ("context", c_void_p),
    ]


class BufferInterface(Structure):
    """``ggml_backend_buffer_i``."""

    _fields_: ClassVar = [
        ("free_buffer", c_void_p),
        ("get_base", c_void_p),
        ("init_tensor", c_void_p),
        ("memset_tensor", c_void_p),
        ("set_tensor", c_void_p),
        ("get_tensor", c_void_p),
        ("set_tensor_2d", c_void_p),
        ("get_tensor_2d", c_void_p),
        ("cpy_tensor", c_void_p),
        ("clear", c_void_p),
        ("reset", c_void_p),
    ]


class Backend(Structure):
    """``ggml_backend``: one stream of one device."""

    _fields_: ClassVar = [
        ("guid", c_void_p),
        ("get_name", c_void_p),
        ("free", c_void_p),
        ("set_tensor_async", c_void_p),
        ("get_tensor_async", c_void_p),
        ("set_tensor_2d_async", c_void_p),
        ("get_tensor_2d_async", c_void_p),
        ("cpy_tensor_async", c_void_p),
        ("synchronize", c_void_p),
        ("graph_plan_create", c_void_p),
        ("graph_plan_free", c_void_p),
        ("graph_plan_update", c_void_p),
        ("graph_plan_compute", c_void_p),
        ("graph_compute", c_void_p),
        ("event_record", c_void_p),
        ("event_wait", c_void_p),
        ("graph_optimize", c_void_p),
        ("device", c_void_p),
        ("context", c_void_p),
    ]


class DeviceProps(Structure):
    """``ggml_backend_dev_props`` with its capabilities inlined."""

    _fields_: ClassVar = [
        ("name", c_char_p),
        ("description", c_char_p),
        ("memory_free", c_size_t),
        ("memory_total", c_size_t),
        ("type", c_int),
        ("device_id", c_char_p),
        ("is_async", c_bool),
        ("host_buffer", c_bool),
        ("buffer_from_host_ptr", c_bool),
        ("events", c_bool),
        ("mmap_support", c_bool),
    ]


class Device(Structure):
    """``ggml_backend_device``."""

    _fields_: ClassVar = [
        ("get_name", c_void_p),
        ("get_description", c_void_p),
        ("get_memory", c_void_p),
        ("get_type", c_void_p),
        ("get_props", c_void_p),
        ("init_backend", c_void_p),
        ("get_buffer_type", c_void_p),
        ("get_host_buffer_type", c_void_p),
        ("buffer_from_host_ptr", c_void_p),
        ("supports_op", c_void_p),
        ("supports_buft", c_void_p),
        ("offload_op", c_void_p),
        ("event_new", c_void_p),
        ("event_free", c_void_p),
        ("event_synchronize", c_void_p),
        ("reg", c_void_p),
        ("context", c_void_p),
    ]


class Registry(Structure):
    """``ggml_backend_reg``."""

    _fields_: ClassVar = [
        ("api_version", c_int),
        ("get_name", c_void_p),
        ("get_device_count", c_void_p),
        ("get_device", c_void_p),
        ("get_proc_address", c_void_p),
        ("context", c_void_p),
    ]


class _MapNode(Structure):
    """One node of libstdc++'s ``std::map<buffer_type*, {model, context, compute}>``."""

    _fields_: ClassVar = [
        ("colour", c_size_t),
        ("parent", c_void_p),
        ("left", c_void_p),
        ("right", c_void_p),
        ("buffer_type", c_void_p),
        ("model", c_size_t),
        ("context", c_size_t),
        ("compute", c_size_t),
    ]


class _Map(Structure):
    """A libstdc++ ``std::map`` by value. 48 bytes: returned through a hidden pointer on every 64-bit ABI."""

    _fields_: ClassVar = [
        ("compare", c_size_t),
        ("colour", c_size_t),
        ("root", c_void_p),
        ("leftmost", c_void_p),
        ("rightmost", c_void_p),
        ("count", c_size_t),
    ]


LogCallback = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
AllocBuffer = CFUNCTYPE(c_void_p, c_void_p, c_size_t)

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_ctx_seq": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_seq_max": (c_uint32, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_is_quantized": (c_bool, [c_int]),
    "ggml_op_name": (c_char_p, [c_int]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buft_is_host": (c_bool, [c_void_p]),
    "ggml_backend_buft_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_init": (c_void_p, [c_void_p, BufferInterface, c_void_p, c_size_t]),
    "ggml_backend_dev_count": (c_size_t, []),
    "ggml_backend_dev_get": (c_void_p, [c_size_t]),
    "ggml_backend_dev_name": (c_char_p, [c_void_p]),
    "ggml_backend_dev_description": (c_char_p, [c_void_p]),
    "ggml_backend_dev_type": (c_int, [c_void_p]),
    "ggml_backend_dev_memory": (None, [c_void_p, POINTER(c_size_t), POINTER(c_size_t)]),
}


def library_path(folder: str | os.PathLike[str]) -> Path:
    """Return the llama library inside ``folder``.

    Raises
    ------
    FileNotFoundError
        The folder holds none.
    """
    suffix = {"darwin": ("libllama.dylib", "libllama.so"), "win32": ("llama.dll", "libllama.dll")}
    for name in suffix.get(sys.platform, ("libllama.so",)):
        path = Path(folder) / name
        if path.exists():
            return path
    raise FileNotFoundError(f"no llama library in {os.fspath(folder)}")


def bind(library: ctypes.CDLL) -> Any:
    """Set the signatures of every function used here and return the library.

    All symbols are resolved through llama's own handle: the wheel ships several copies of ggml, and a second
    one loaded by name would be an unrelated instance with its own devices.

    Raises
    ------
    AttributeError
        A function is missing from this build.
    """
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def breakdown_function(library: ctypes.CDLL) -> Any:
    """Return ``llama_get_memory_breakdown``, exported under its C++ name, or None where it cannot be read.

    The value returned is a ``std::map``: only libstdc++'s layout on 64-bit Linux is known here.
    """
    if not sys.platform.startswith("linux") or ctypes.sizeof(c_void_p) != ctypes.sizeof(ctypes.c_uint64):
        return None
    for name in BREAKDOWN_SYMBOLS:
        function = getattr(library, name, None)
        if function is not None:
            function.restype, function.argtypes = _Map, [c_void_p]
            return function
    return None


_MAX_BUFFER_TYPES = 256


def read_breakdown(library: Any, function: Any, context: int) -> list[dict[str, Any]]:
    """Return what llama.cpp says a context holds, one row per buffer type.

    Each row has ``buffer`` and ``device`` (names), ``host`` (True where it is in ordinary memory) and
    ``model``, ``context`` and ``compute`` in bytes. The nodes of the map are not freed: some hundred bytes a
    call, against guessing at the library's allocator.

    Raises
    ------
    ValueError
        The map does not look like one: the layout is not the expected one.
    """
    result = function(context)
    if not 0 < result.count <= _MAX_BUFFER_TYPES or not result.root:
        raise ValueError(f"the memory breakdown has {result.count} entries")
    rows: list[dict[str, Any]] = []
    pending = [result.root]
    while pending:
        if len(rows) > result.count:
            raise ValueError("the memory breakdown has more nodes than entries")
        node = _MapNode.from_address(pending.pop())
        pending += [child for child in (node.left, node.right) if child]
        buffer_type = node.buffer_type
        device = library.ggml_backend_buft_get_device(buffer_type)
        rows.append(
            {
                "buffer": library.ggml_backend_buft_name(buffer_type).decode(),
                "device": library.ggml_backend_dev_name(device).decode() if device else "CPU",
                "host": library.ggml_backend_buft_is_host(buffer_type),
                "model": node.model,
                "context": node.context,
                "compute": node.compute,
            }
        )
    if len(rows) != result.count:
        raise ValueError(f"the memory breakdown has {len(rows)} nodes and claims {result.count}")
    return sorted(rows, key=lambda row: (row["host"], row["device"], row["buffer"]))
