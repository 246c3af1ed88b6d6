"""GPU memory that two processes share, through the CUDA driver.

Torch does not allocate it: its allocations lie among other tensors, which a peer would see too, its handles
are valid within one release of torch only, and it counts readers in files that remain when one of them is
killed."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from .link import LinkError

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_GRANULE = 2 << 20  # smaller allocations may share their pages, and so their handle, with other memory
_LAZY_ENABLE_PEER_ACCESS = 1  # the only flag that exists, and the one we want


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


_SIGNATURES: dict[str, list[Any]] = {
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
    "cuCtxPushCurrent_v2": [ctypes.c_void_p],
    "cuCtxPopCurrent_v2": [ctypes.POINTER(ctypes.c_void_p)],
    "cuMemAlloc_v2": [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t],
    "cuIpcGetMemHandle": [ctypes.POINTER(_Handle), ctypes.c_uint64],
    "cuIpcOpenMemHandle_v2": [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [ctypes.c_uint64],
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}


class CudaGpu:
    """Implements `interfaces.Gpu`. Everything is in the context that torch uses too."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.uuid = str(torch.cuda.get_device_properties(device).uuid)
        self.device = device
        self._driver = load_driver()
        number = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(number), device.index or 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), number)

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, bytes]:
        address, handle = ctypes.c_uint64(), _Handle()
        with self._in_context():
            self._call("cuMemAlloc_v2", ctypes.byref(address), -(-num_bytes // _GRANULE) * _GRANULE)
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return self._tensor(address.value, num_bytes, lambda: None), bytes(handle)

    def open(self, handle: bytes, num_bytes: int) -> torch.Tensor:
        """Memory that is opened more than once is mapped once; CUDA counts."""
        if len(handle) != HANDLE_BYTES:
            raise LinkError(f"the peer's handle has {len(handle)} bytes, expected {HANDLE_BYTES}")
        address = ctypes.c_uint64()
        with self._in_context():
            self._call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle),
                _LAZY_ENABLE_PEER_ACCESS,
            )
        return self._tensor(address.value, num_bytes, partial(self._close, address.value))

    def _close(self, address: int) -> None:
        with suppress(LinkError), self._in_context():  # there is no caller left to report it to
            self._call("cuIpcCloseMemHandle", address)

    def _tensor(self, address: int, num_bytes: int, on_release: Callable[[], None]) -> torch.Tensor:
        return torch.as_tensor(_Memory(address, num_bytes, on_release), device=self.device)

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *args: Any) -> None:
        result = getattr(self._driver, name)(*args)
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(result, ctypes.byref(text))
            raise LinkError(f"{name} failed: {(text.value or b'?').decode()} ({result})")


class _Memory:
    """The object from which torch makes a tensor; the tensor and all views of it keep it alive."""

    def __init__(self, address: int, num_bytes: int, on_release: Callable[[], None]) -> None:
        self._on_release = on_release
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }

    def __del__(self) -> None:
        self._on_release()


def load_driver() -> Any:
    """The CUDA driver's library, which belongs to the machine, not to torch."""
    driver = ctypes.CDLL("libcuda.so.1")
    for name, argument_types in _SIGNATURES.items():
        getattr(driver, name).argtypes = argument_types
    return driver
