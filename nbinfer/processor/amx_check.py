"""Whether a build of llama.cpp computes rightly with AMX; run by itself: ``python amx_check.py LIBRARY``.

Some builds end the process at the first product, which is why this is one of its own. The exit status is 0
when every product of weights in AMX's layout is that of the same weights in the file's own, and ``ABSENT``
where there is no such layout, or this build does not let it be tried.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

# ggml's numbers of the types that it rearranges for AMX: Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_XS.
_TYPES = (2, 3, 8, 12, 13, 14, 23)
_F32 = 0
# One row is computed without tiles, 33 with whole and broken ones.
_ROWS = (1, 33)
_WIDTH, _OUTPUTS = 256, 64
# Both sides multiply the same integers; the sums are rounded in another order.
_TOLERANCE = 1e-4
ABSENT = 2
"""The exit status where the build, or the system, has no AMX, or it cannot be tried."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buffer_get_type": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, ctypes.c_char_p)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (c_void_p,)),
}


def bind(library: ctypes.CDLL) -> dict[str, Any]:
    """Return ggml's functions by name, found through llama's library.

    Raises
    ------
    AttributeError
        This build does not export one of them.
    """
    functions = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = library[name]
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


def weight_layouts(ggml: dict[str, Any]) -> dict[str, int]:
    """Return the weight layouts of llama.cpp's CPU backend beside the file's own: address by name.

    The first call in a process is when ggml asks the system for AMX.
    """
    registry = ggml["ggml_backend_cpu_reg"]()
    device = ggml["ggml_backend_reg_dev_get"](registry, 0)
    address = ggml["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return {}
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
    found: dict[str, int] = {}
    while layout := listed[len(found)]:
        found[ggml["ggml_backend_buft_name"](layout).decode()] = layout
    return found


def _products(
    ggml: dict[str, Any], layout: int, kind: int, weights: Any, inputs: Any, rows: int
) -> list[float]:
    """Return ``weights @ inputs`` for weights of a type that lie in a layout."""
    main_memory = ggml["ggml_backend_cpu_buffer_type"]()
    size = ggml["ggml_row_size"](kind, _WIDTH) * _OUTPUTS
    packed = (ctypes.c_char * size)()
    ggml["ggml_quantize_chunk"](kind, weights, packed, 0, _OUTPUTS, _WIDTH, None)
    held, graph_held = (ggml["ggml_init"](_InitParams(1 << 20, None, True)) for _ in range(2))
    backend = ggml["ggml_backend_cpu_init"]()
    ggml["ggml_backend_cpu_set_n_threads"](backend, 2)
    matrix = ggml["ggml_new_tensor_2d"](held, kind, _WIDTH, _OUTPUTS)
    ggml["ggml_backend_alloc_ctx_tensors_from_buft"](held, layout)
    ggml["ggml_backend_tensor_set"](matrix, packed, 0, size)
    vectors = ggml["ggml_new_tensor_2d"](graph_held, _F32, _WIDTH, rows)
    product = ggml["ggml_mul_mat"](graph_held, matrix, vectors)
    graph = ggml["ggml_new_graph"](graph_held)
    ggml["ggml_build_forward_expand"](graph, product)
    ggml["ggml_backend_alloc_ctx_tensors_from_buft"](graph_held, main_memory)
    ggml["ggml_backend_tensor_set"](vectors, inputs, 0, 4 * _WIDTH * rows)
    ggml["ggml_backend_graph_compute"](backend, graph)
    out = (c_float * (_OUTPUTS * rows))()
    ggml["ggml_backend_tensor_get"](product, out, 0, ctypes.sizeof(out))
    return list(out)


def wrong_types(library: ctypes.CDLL) -> list[int]:
    """Return ggml's numbers of the types whose products with AMX are wrong; a bad build does not return.

    Raises
    ------
    LookupError
        The process has no AMX: the build or the system does not give it.
    """
    ggml = bind(library)
    tiles = weight_layouts(ggml)["AMX"]
    drawn = random.Random(0)  # noqa: S311 - test data
    weights = (c_float * (_WIDTH * _OUTPUTS))(*(drawn.gauss(0, 1) for _ in range(_WIDTH * _OUTPUTS)))
    plain = ggml["ggml_backend_cpu_buffer_type"]()
    wrong = []
    for rows in _ROWS:
        inputs = (c_float * (_WIDTH * rows))(*(drawn.gauss(0, 1) for _ in range(_WIDTH * rows)))
        for kind in _TYPES:
            right = _products(ggml, plain, kind, weights, inputs, rows)
            got = _products(ggml, tiles, kind, weights, inputs, rows)
            allowed = _TOLERANCE * max(map(abs, right))
            worst = max(abs(a - b) for a, b in zip(got, right, strict=True))
            if not worst <= allowed:  # NaN as well
                wrong.append(kind)
    return wrong


if __name__ == "__main__":
    # A bad build crashes, here where the user's files are: it leaves no picture of its memory.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        sys.exit(1 if wrong_types(ctypes.CDLL(sys.argv[1])) else 0)
    except (LookupError, AttributeError):
        sys.exit(ABSENT)
