"""A GPU that is not there: ggml's device interface, answered from Python.

llama.cpp plans its memory by asking a device which operations it runs, how it aligns and pads tensors and
how much memory it has. A device that answers as a CUDA card of the Turing generation or later does, but
whose buffers are only numbers, makes llama.cpp plan for that card on any machine. Nothing is ever computed
on it.

The rules mirrored are those of ggml's CUDA backend: 128-byte alignment; quantised rows padded to a multiple
of 512 elements; flash attention for the head sizes that its kernels know, with an f16 copy of one layer's
keys and values when the cache is of another type; the state-space kernels' limits; matrices multiplied by
32 rows or more are fetched from host memory.
"""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from typing import Any

from nbinfer.memory.probe import abi
from nbinfer.memory.probe.cuda import has_flash_kernel

_ALIGNMENT = 128
_ROW_PADDING = 512
_OFFLOAD_ROWS = 32
# Where the numbers begin that stand for memory: nothing is mapped there and nothing is read or written.
_NOWHERE = 1 << 40
# Smaller host buffers are really allocated; larger ones (recurrent state) would only be cleared and freed.
_REAL_HOST_BYTES = 1 << 20

_OP_OFFSET = abi.Tensor.op.offset
_NE_OFFSET = abi.Tensor.ne.offset
_SOURCES_OFFSET = abi.Tensor.src.offset

_Name = CFUNCTYPE(c_void_p, c_void_p)
_Void = CFUNCTYPE(None, c_void_p)
_Size = CFUNCTYPE(c_size_t, c_void_p)
_Int = CFUNCTYPE(c_int, c_void_p)
_TensorSize = CFUNCTYPE(c_size_t, c_void_p, c_void_p)
_Memory = CFUNCTYPE(None, c_void_p, POINTER(c_size_t), POINTER(c_size_t))
_Props = CFUNCTYPE(None, c_void_p, POINTER(abi.DeviceProps))
_Init = CFUNCTYPE(c_void_p, c_void_p, c_char_p)
_Ask = CFUNCTYPE(c_bool, c_void_p, c_void_p)
_FreeEvent = CFUNCTYPE(None, c_void_p, c_void_p)
_Proc = CFUNCTYPE(c_void_p, c_void_p, c_char_p)
_Item = CFUNCTYPE(c_void_p, c_void_p, c_size_t)
_Clear = CFUNCTYPE(None, c_void_p, ctypes.c_uint8)


def _address(function: Any) -> int:
    return ctypes.cast(function, c_void_p).value or 0


class Pretender:
    """Makes pretend devices and owns every callback and structure that ggml holds a pointer to.

    Parameters
    ----------
    library
        The bound llama library.

    Notes
    -----
    One per process; a device stays valid for as long as this object lives. Devices are handed to llama.cpp
    in an explicit list and never registered, so they do not change what other models see.
    """

    _host_name: Any
    _registry_name: Any
    _host_buffer_type: abi.BufferType

    def __init__(self, library: Any) -> None:
        self._library = library
        self._devices: dict[tuple[Any, ...], _PretendDevice] = {}
        self._by_address: dict[int, _PretendDevice] = {}
        self._by_buffer_type: dict[int, _PretendDevice] = {}
        self._several = False
        # Operation codes move between releases, their names do not. GLU is the last: reading on would crash.
        ops: dict[bytes, int] = {}
        while b"GLU" not in ops:
            ops[library.ggml_op_name(len(ops))] = len(ops)
        self._quantised = frozenset(code for code in range(43) if library.ggml_is_quantized(code))
        self._flash_attention = ops[b"FLASH_ATTN_EXT"]
        self._checks = {
            ops[b"FLASH_ATTN_EXT"]: self._supports_flash_attention,
            ops[b"SSM_CONV"]: self._supports_conv,
            ops[b"SSM_SCAN"]: self._supports_scan,
        }
        # Which dimension of an operation's result counts its rows; others count all of them.
        self._rows_of = {ops[b"GET_ROWS"]: -1, ops[b"MUL_MAT"]: 1}
        self._rows_of.update({ops[name]: 2 for name in (b"MUL_MAT_ID", b"ROPE", b"ROPE_BACK")})
        self._make_callbacks()
        self._make_host_memory_pretend()

    def device(self, *, name: str, description: str, total: int, free: int, integrated: bool) -> int:
        """Return the address of a pretend device; the same arguments give the same device.

        ``total`` and ``free`` are in bytes. ``integrated`` makes it share the host's memory.
        """
        key = (name, description, total, free, integrated)
        if key not in self._devices:
            device = _PretendDevice(self, name, description, total, free, integrated=integrated)
            self._devices[key] = device
            self._by_address[ctypes.addressof(device.struct)] = device
            self._by_buffer_type[ctypes.addressof(device.buffer_type)] = device
        return ctypes.addressof(self._devices[key].struct)

    def plan_for(self, count: int) -> None:
        """Say how many devices the next model is planned on; one device needs fewer questions."""
        self._several = count > 1

    # -- what ggml asks ----------------------------------------------------------------------------------

    def _make_callbacks(self) -> None:
        self.callbacks: dict[str, Any] = {
            "device_name": _Name(lambda device: self._by_address[device].name_address),
            "device_description": _Name(lambda device: self._by_address[device].description_address),
            "buffer_name": _Name(lambda buffer_type: self._by_buffer_type[buffer_type].name_address),
            "backend_name": _Name(lambda backend: self._backend_device(backend).name_address),
            "host_name": _Name(lambda _: ctypes.addressof(self._host_name)),
            "registry_name": _Name(lambda _: ctypes.addressof(self._registry_name)),
            "memory": _Memory(self._memory),
            "type": _Int(lambda device: self._by_address[device].kind),
            "props": _Props(self._props),
            "init": _Init(lambda device, _: ctypes.addressof(self._by_address[device].backend)),
            "buffer_type": _Name(lambda device: ctypes.addressof(self._by_address[device].buffer_type)),
            "host_buffer_type": _Name(lambda _: ctypes.addressof(self._host_buffer_type)),
            "supports_op": _Ask(self._supports_op),
            "supports_buffer": _Ask(self._supports_buffer),
            "offload_op": _Ask(self._offload_op),
            "alignment": _Size(lambda _: _ALIGNMENT),
            "alloc_size": _TensorSize(self._alloc_size),
            "alloc": abi.AllocBuffer(self._alloc),
            "alloc_host": abi.AllocBuffer(self._alloc_host),
            "base": _Name(lambda _: _NOWHERE),
            "free_buffer": _Void(lambda _: None),
            "clear": _Clear(lambda *_: None),
            "free_backend": _Void(lambda _: None),
            "event_new": _Name(lambda device: ctypes.addressof(self._by_address[device].event)),
            "event_free": _FreeEvent(lambda *_: None),
            "no_proc": _Proc(lambda *_: None),
            "no_devices": _Size(lambda _: 0),
            "no_device": _Item(lambda *_: None),
        }
        addresses = {name: _address(function) for name, function in self.callbacks.items()}
        self.addresses = addresses
        self._host_name = ctypes.create_string_buffer(b"CUDA_Host")
        self._registry_name = ctypes.create_string_buffer(b"CUDA")
        self.guid = ctypes.create_string_buffer(b"nbinfer pretend.", 16)
        self.registry = abi.Registry(
            api_version=2,
            get_name=addresses["registry_name"],
            get_device_count=addresses["no_devices"],
            get_device=addresses["no_device"],
            get_proc_address=addresses["no_proc"],
        )
        self._buffer_interface = abi.BufferInterface(
            free_buffer=addresses["free_buffer"], get_base=addresses["base"], clear=addresses["clear"]
        )

    def _make_host_memory_pretend(self) -> None:
        """Let large host buffers be numbers too, and make the pinned host memory of the pretend devices.

        llama.cpp allocates and clears recurrent state even while it only plans; for a hybrid model with 256
        sequences that is 19 GiB.
        """
        plain = abi.BufferType.from_address(self._library.ggml_backend_cpu_buffer_type())
        self._plain_host_alloc = abi.AllocBuffer(plain.alloc_buffer)
        plain.alloc_buffer = self.addresses["alloc_host"]
        self._host_buffer_type = abi.BufferType(
            get_name=self.addresses["host_name"],
            alloc_buffer=self.addresses["alloc"],
            get_alignment=plain.get_alignment,
            get_alloc_size=plain.get_alloc_size,
            is_host=plain.is_host,
        )

    def _backend_device(self, backend: int) -> _PretendDevice:
        return self._by_address[abi.Backend.from_address(backend).device]

    def _memory(self, device: int, free: Any, total: Any) -> None:
        free[0], total[0] = self._by_address[device].free, self._by_address[device].total

    def _props(self, device: int, props: Any) -> None:
        made = self._by_address[device]
        answer = props[0]
        answer.name, answer.description = made.name, made.description
        answer.memory_free, answer.memory_total = made.free, made.total
        answer.type, answer.device_id = made.kind, None
        answer.is_async = answer.host_buffer = answer.events = True
        answer.buffer_from_host_ptr = False
        answer.mmap_support = made.kind != abi.DEVICE_IGPU

    def _alloc(self, buffer_type: int, size: int) -> Any:
        return self._library.ggml_backend_buffer_init(buffer_type, self._buffer_interface, None, size)

    def _alloc_host(self, buffer_type: int, size: int) -> Any:
        make = self._plain_host_alloc if size < _REAL_HOST_BYTES else self._alloc
        return make(buffer_type, size)

    def _alloc_size(self, _: int, tensor: int) -> int:
        size: int = self._library.ggml_nbytes(tensor)
        kind = c_int32.from_address(tensor).value
        if kind in self._quantised:
            rest = c_int64.from_address(tensor + _NE_OFFSET).value % _ROW_PADDING
            if rest:
                size += self._library.ggml_row_size(kind, _ROW_PADDING - rest)
        if c_int32.from_address(tensor + _OP_OFFSET).value == self._flash_attention:
            size += self._f16_copies(tensor, size)
        return size

    def _f16_copies(self, node: int, size: int) -> int:
        """Return the bytes of the f16 keys and values that flash attention keeps behind its result."""
        sources = abi.Tensor.from_address(node).src
        keys, values = abi.Tensor.from_address(sources[1]), abi.Tensor.from_address(sources[2])
        end = size
        if keys.type != abi.TYPE_F16:
            end = _padded(end) + 2 * _elements(keys)
        shared = values.view_src and (
            values.view_src == sources[1]
            or (values.view_src == keys.view_src and values.view_offs == keys.view_offs)
        )
        if values.type != abi.TYPE_F16 and not (shared and keys.type != abi.TYPE_F16):
            end = _padded(end) + 2 * _elements(values)
        return end - size

    def _supports_op(self, device: int, node: int) -> bool:
        if self._several and self._on_another_device(device, node):
            return False
        check = self._checks.get(c_int32.from_address(node + _OP_OFFSET).value)
        return check is None or check(abi.Tensor.from_address(node))

    def _on_another_device(self, device: int, node: int) -> bool:
        for source in (c_void_p * 10).from_address(node + _SOURCES_OFFSET):
            if not source:
                continue
            buffer = abi.Tensor.from_address(source).buffer
            if not buffer:
                continue
            # ggml_backend_buffer: eleven callbacks, then its type.
            owner = c_void_p.from_address(buffer + ctypes.sizeof(abi.BufferInterface)).value
            made = self._by_buffer_type.get(owner or 0)
            if made is not None and ctypes.addressof(made.struct) != device:
                return True
        return False

    def _supports_flash_attention(self, node: abi.Tensor) -> bool:
        query, keys, values = (abi.Tensor.from_address(node.src[i]) for i in range(3))
        if keys.ne[2] == 0 or query.ne[2] % keys.ne[2]:
            return False
        ratio = query.ne[2] // keys.ne[2]
        mask = abi.Tensor.from_address(node.src[3]) if node.src[3] else None
        max_bias = ctypes.c_float.from_buffer_copy(ctypes.c_int32(node.op_params[1])).value
        plain = mask is not None and max_bias == 0.0 and keys.ne[1] % 256 == 0
        if not has_flash_kernel(keys.ne[0], values.ne[0], ratio, plain=plain):
            return False
        if keys.type not in _FLASH_TYPES or values.type not in _FLASH_TYPES:
            return False
        return mask is None or mask.ne[2] == 1

    @staticmethod
    def _supports_conv(node: abi.Tensor) -> bool:
        return bool(abi.Tensor.from_address(node.src[0]).ne[1] % 128 == 0)

    @staticmethod
    def _supports_scan(node: abi.Tensor) -> bool:
        state, decay = abi.Tensor.from_address(node.src[0]), abi.Tensor.from_address(node.src[3])
        if decay.ne[0] == 1:  # Mamba 2
            return state.ne[0] in (96, 128, 256) and state.ne[1] % 16 == 0
        groups = abi.Tensor.from_address(node.src[4]).ne[1]
        return bool(
            node.op_params[0] <= 1
            and state.ne[0] == 16  # noqa: PLR2004
            and state.ne[1] == 1
            and state.ne[2] % 128 == 0
            and groups == 1
        )

    def _supports_buffer(self, device: int, buffer_type: int) -> bool:
        made = self._by_address[device]
        if buffer_type == ctypes.addressof(made.buffer_type):
            return True
        return made.kind == abi.DEVICE_IGPU and buffer_type == ctypes.addressof(self._host_buffer_type)

    def _offload_op(self, _: int, node: int) -> bool:
        tensor = abi.Tensor.from_address(node)
        dimension = self._rows_of.get(tensor.op)
        if dimension is None:
            return bool(tensor.ne[1] * tensor.ne[2] * tensor.ne[3] >= _OFFLOAD_ROWS)
        return bool(dimension >= 0 and tensor.ne[dimension] >= _OFFLOAD_ROWS)


# Types of keys and values that the kernels read.
_FLASH_TYPES = frozenset((0, 1, 30, 2, 3, 6, 7, 8))  # F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0


def _padded(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _elements(tensor: abi.Tensor) -> int:
    return int(tensor.ne[0] * tensor.ne[1] * tensor.ne[2] * tensor.ne[3])


class _PretendDevice:
    """The structures of one device; ``Pretender`` keeps it alive."""

    struct: abi.Device
    buffer_type: abi.BufferType
    backend: abi.Backend
    event: Any

    def __init__(
        self, owner: Pretender, name: str, description: str, total: int, free: int, *, integrated: bool
    ) -> None:
        self.name, self.description = name.encode(), description.encode()
        self._name_text = ctypes.create_string_buffer(self.name)
        self._description_text = ctypes.create_string_buffer(self.description)
        self.name_address = ctypes.addressof(self._name_text)
        self.description_address = ctypes.addressof(self._description_text)
        self.total, self.free = total, free
        self.kind = abi.DEVICE_IGPU if integrated else abi.DEVICE_GPU
        at = owner.addresses
        self.struct = abi.Device(
            get_name=at["device_name"],
            get_description=at["device_description"],
            get_memory=at["memory"],
            get_type=at["type"],
            get_props=at["props"],
            init_backend=at["init"],
            get_buffer_type=at["buffer_type"],
            get_host_buffer_type=at["host_buffer_type"],
            supports_op=at["supports_op"],
            supports_buft=at["supports_buffer"],
            offload_op=at["offload_op"],
            event_new=at["event_new"],
            event_free=at["event_free"],
            reg=ctypes.addressof(owner.registry),
        )
        address = ctypes.addressof(self.struct)
        self.buffer_type = abi.BufferType(
            get_name=at["buffer_name"],
            alloc_buffer=at["alloc"],
            get_alignment=at["alignment"],
            get_alloc_size=at["alloc_size"],
            device=address,
        )
        self.event = (c_void_p * 2)(address, None)  # ggml_backend_event: its device, a context
        self.backend = abi.Backend(
            guid=ctypes.addressof(owner.guid),
            get_name=at["backend_name"],
            free=at["free_backend"],
            device=address,
        )
