"""ggml's own GGUF reader, in a child process: reads paths from stdin, writes one JSON line for each.

:class:`GgmlReader` starts this file as a script.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path


N_TYPES = 43  # GGML_TYPE_COUNT in llama-cpp-python 0.3.36


class GgmlReader:
    """A running child; :meth:`read` asks it about one file."""

    def __init__(self) -> None:
        self._child = self._start()

    def _start(self) -> subprocess.Popen[str]:
        # Without GGML_NO_BACKTRACE an abort starts a debugger, which takes seconds.
        env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        return subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def read(self, path: Path) -> dict[str, Any]:
        """Return what ggml reads: counts and tensors, or ``ok`` false, with ``crash`` when it died."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{path}\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._child.wait()
        self.close()
        self._child = self._start()
        return {"ok": False, "crash": code}

    def types(self) -> dict[str, list[int]]:
        """Return block and bytes of every tensor type, by its number."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        answer: dict[str, list[int]] = json.loads(self._child.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _library() -> ctypes.CDLL:
    import llama_cpp.llama_cpp

    # The wheel holds several copies of ggml; the one that libllama uses is reached through libllama.
    lib = ctypes.CDLL(llama_cpp.llama_cpp._lib._name)
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Params]
    for name, restype, extra in (
        ("gguf_free", None, 0),
        ("gguf_get_n_kv", ctypes.c_int64, 0),
        ("gguf_get_n_tensors", ctypes.c_int64, 0),
        ("gguf_get_data_offset", ctypes.c_size_t, 0),
        ("gguf_get_alignment", ctypes.c_size_t, 0),
        ("gguf_get_tensor_name", ctypes.c_char_p, 1),
        ("gguf_get_tensor_type", ctypes.c_int, 1),
        ("gguf_get_tensor_offset", ctypes.c_size_t, 1),
        ("gguf_get_tensor_size", ctypes.c_size_t, 1),
    ):
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64][: 1 + extra]
    return lib


def _read(lib: ctypes.CDLL, path: str) -> dict[str, Any]:
    handle = lib.gguf_init_from_file(path.encode(), _Params(True, None))
    if not handle:
        return {"ok": False}
    try:
        return {
            "ok": True,
            "n_kv": lib.gguf_get_n_kv(handle),
            "alignment": lib.gguf_get_alignment(handle),
            "data_offset": lib.gguf_get_data_offset(handle),
            "tensors": [
                [
                    lib.gguf_get_tensor_name(handle, i).decode("utf-8", "replace"),
                    lib.gguf_get_tensor_type(handle, i),
                    lib.gguf_get_tensor_offset(handle, i),
                    lib.gguf_get_tensor_size(handle, i),
                ]
                for i in range(lib.gguf_get_n_tensors(handle))
            ],
        }
    finally:
        lib.gguf_free(handle)


def _types(lib: ctypes.CDLL) -> dict[str, Any]:
    # Numbers beyond the last type are out of bounds in ggml.
    sizes = {str(n): [lib.ggml_blck_size(n), lib.ggml_type_size(n)] for n in range(N_TYPES)}
    return {n: size for n, size in sizes.items() if size[1]}


def _serve() -> None:
    lib = _library()
    for line in sys.stdin:
        path = line.rstrip("\n")
        print(json.dumps(_read(lib, path) if path else _types(lib)), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    _serve()
