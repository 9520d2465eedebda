"""ONNX Runtime's side of its C interface, for tensors that are only addresses: it calls a library's ops as a session on
a GPU would, where there is none.

Run as a program, it takes cases on its standard input and gives what became of them, as JSON; see :func:`main`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

ELEMENT_TYPES = {"fp32": 1, "int32": 6, "int64": 7, "bool": 9, "fp16": 10}
_FIRST_OUTPUT = 0x6F0000000000  # addresses of outputs begin here
_P, _S, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def _function(result: Any, *arguments: Any) -> Any:
    return ctypes.CFUNCTYPE(result, *arguments)


class _CustomOp(ctypes.Structure):
    """As ONNX Runtime 1.17 declares OrtCustomOp."""

    _fields_ = [
        ("version", ctypes.c_uint32),
        ("CreateKernel", _P),
        ("GetName", _function(ctypes.c_char_p, _P)),
        ("GetExecutionProviderType", _function(ctypes.c_char_p, _P)),
        ("GetInputType", _function(_I, _P, _S)),
        ("GetInputTypeCount", _function(_S, _P)),
        ("GetOutputType", _function(_I, _P, _S)),
        ("GetOutputTypeCount", _function(_S, _P)),
        ("KernelCompute", _P),
        ("KernelDestroy", _function(None, _P)),
        ("GetInputCharacteristic", _function(_I, _P, _S)),
        ("GetOutputCharacteristic", _function(_I, _P, _S)),
        ("GetInputMemoryType", _function(_I, _P, _S)),
        ("GetVariadicInputMinArity", _P),
        ("GetVariadicInputHomogeneity", _P),
        ("GetVariadicOutputMinArity", _P),
        ("GetVariadicOutputHomogeneity", _P),
        ("CreateKernelV2", _function(_P, _P, _P, _P, ctypes.POINTER(_P))),
        ("KernelComputeV2", _function(_P, _P, _P)),
    ]


class _Base(ctypes.Structure):
    _fields_ = [("GetApi", _function(_P, ctypes.c_uint32)), ("GetVersionString", _function(ctypes.c_char_p))]


@dataclass
class Tensor:
    """shape, element type (of :data:`ELEMENT_TYPES`) and address, 0 of no elements; there is nothing there."""

    shape: tuple[int, ...]
    type: str
    address: int


@dataclass
class Call:
    """What a context stands for: a call of a node."""

    inputs: list[Tensor | None]
    outputs: list[Tensor | None]
    output_types: list[str]
    stream: int


@dataclass
class Op:
    name: str
    provider: str
    inputs: list[str]
    outputs: list[str]
    optional: list[bool]
    struct: Any = field(repr=False)
    address: int = field(repr=False)


class Failed(Exception):
    """The message of an OrtStatus."""


class Library:
    """A library of custom ops, registered. ops: as it gave them."""

    def __init__(self, path: str) -> None:
        self.ops: list[Op] = []
        self._objects: dict[int, Any] = {}
        self._functions: list[Any] = []
        self._next_output = _FIRST_OUTPUT
        table = (_P * 320)()
        for place, (result, arguments, body) in _api(self).items():
            function = _function(result, *arguments)(body)
            self._functions.append(function)
            table[place] = ctypes.cast(function, _P).value
        self._table = table
        get_api = _Base._fields_[0][1](lambda version: ctypes.addressof(table))
        get_version = _Base._fields_[1][1](lambda: b"1.17.0")
        self._base = _Base(get_api, get_version)
        self._library = ctypes.CDLL(path)
        register = self._library.RegisterCustomOps
        register.restype, register.argtypes = _P, [_P, _P]
        self._raise(register(self.handle("options"), ctypes.addressof(self._base)))

    def run(
        self, op: Op, attributes: dict[str, Any], inputs: Sequence[Tensor | None], stream: int
    ) -> list[Tensor | None]:
        """The outputs of a node. Raises Failed with what the node says."""
        kernel = _P()
        self._raise(op.struct.CreateKernelV2(op.address, 0, self.handle(attributes), ctypes.byref(kernel)))
        call = Call(list(inputs), [None] * len(op.outputs), op.outputs, stream)
        try:
            self._raise(op.struct.KernelComputeV2(kernel, self.handle(call)))
        finally:
            op.struct.KernelDestroy(kernel)
        return call.outputs

    def handle(self, thing: Any) -> int:
        """A pointer that stands for an object of ours."""
        number = len(self._objects) + 1
        self._objects[number] = thing
        return number

    def of(self, handle: int) -> Any:
        return self._objects[handle]

    def output(self, call: Call, at: int, shape: tuple[int, ...]) -> Tensor:
        tensor = call.outputs[at]
        if tensor is None:
            address = 0 if 0 in shape else self._next_output
            tensor = call.outputs[at] = Tensor(shape, call.output_types[at], address)
            self._next_output += 1 << 24
        return tensor

    def add(self, address: int) -> None:
        struct = _CustomOp.from_address(address)
        names = {number: name for name, number in ELEMENT_TYPES.items()}
        counts = struct.GetInputTypeCount(address), struct.GetOutputTypeCount(address)
        self.ops.append(
            Op(
                struct.GetName(address).decode(),
                struct.GetExecutionProviderType(address).decode(),
                [names[struct.GetInputType(address, at)] for at in range(counts[0])],
                [names[struct.GetOutputType(address, at)] for at in range(counts[1])],
                [bool(struct.GetInputCharacteristic(address, at)) for at in range(counts[0])],
                struct,
                address,
            )
        )

    def _raise(self, status: int | None) -> None:
        if status:
            raise Failed(self.of(status).decode())


def _put(kind: Any, address: int, value: Any) -> None:
    kind.from_address(address).value = value


def _api(ort: Library) -> dict[int, tuple[Any, tuple[Any, ...], Callable[..., Any]]]:
    """Place in the table: (result, arguments, function), of those functions that a library of ours calls."""
    size = ctypes.c_size_t

    def attribute(kind: Any) -> Callable[[int, bytes, int], int | None]:
        def get(info: int, name: bytes, value: int) -> int | None:
            found = ort.of(info).get(name.decode())
            if found is None:
                return ort.handle(b"no attribute " + name)
            return _put(kind, value, found)

        return get

    def text(info: int, name: bytes, buffer: int | None, length: int) -> int | None:
        found = ort.of(info).get(name.decode())
        if found is None:
            return ort.handle(b"no attribute " + name)
        found = found.encode() + b"\0"
        if buffer:
            ctypes.memmove(buffer, found, len(found))
        return _put(size, length, len(found))

    def integers(info: int, name: bytes, values: int | None, count: int) -> int | None:
        found = ort.of(info).get(name.decode())
        if found is None:
            return ort.handle(b"no attribute " + name)
        if values:
            ctypes.memmove(values, (ctypes.c_int64 * len(found))(*found), 8 * len(found))
        return _put(size, count, len(found))

    def dimensions(info: int, values: int, count: int) -> None:
        ctypes.memmove(values, (ctypes.c_int64 * count)(*ort.of(info).shape), 8 * count)

    def get_input(context: int, at: int, value: int) -> None:
        tensor = ort.of(context).inputs[at]
        _put(_P, value, None if tensor is None else ort.handle(tensor))

    def get_output(context: int, at: int, shape: int, rank: int, value: int) -> None:
        sizes = tuple((ctypes.c_int64 * rank).from_address(shape)) if rank else ()
        _put(_P, value, ort.handle(ort.output(ort.of(context), at, sizes)))

    name = ctypes.c_char_p
    return {
        0: (_P, (_I, name), lambda code, message: ort.handle(message)),  # CreateStatus
        2: (_P, (_P,), lambda status: ctypes.cast(name(ort.of(status)), _P).value),  # GetErrorMessage
        26: (_P, (name, _P), lambda domain, made: _put(_P, made, ort.handle(domain))),  # CreateCustomOpDomain
        27: (_P, (_P, _P), lambda domain, op: ort.add(op)),  # CustomOpDomain_Add
        28: (_P, (_P, _P), lambda options, domain: None),  # AddCustomOpDomain
        51: (_P, (_P, _P), lambda value, data: _put(_P, data, ort.of(value).address)),  # GetTensorMutableData
        60: (_P, (_P, _P), lambda info, kind: _put(_I, kind, ELEMENT_TYPES[ort.of(info).type])),  # ElementType
        61: (_P, (_P, _P), lambda info, count: _put(size, count, len(ort.of(info).shape))),  # GetDimensionsCount
        62: (_P, (_P, _P, _S), dimensions),  # GetDimensions
        65: (_P, (_P, _P), lambda value, info: _put(_P, info, value)),  # GetTensorTypeAndShape
        85: (_P, (_P, name, _P), attribute(ctypes.c_float)),  # KernelInfoGetAttribute_float
        86: (_P, (_P, name, _P), attribute(ctypes.c_int64)),  # KernelInfoGetAttribute_int64
        87: (_P, (_P, name, _P, _P), text),  # KernelInfoGetAttribute_string
        88: (_P, (_P, _P), lambda context, count: _put(size, count, len(ort.of(context).inputs))),
        89: (_P, (_P, _P), lambda context, count: _put(size, count, len(ort.of(context).outputs))),
        90: (_P, (_P, _S, _P), get_input),  # KernelContext_GetInput
        91: (_P, (_P, _S, _P, _S, _P), get_output),  # KernelContext_GetOutput
        93: (None, (_P,), lambda status: None),  # ReleaseStatus
        99: (None, (_P,), lambda info: None),  # ReleaseTensorTypeAndShapeInfo
        163: (_P, (_P, name, _P, _P), integers),  # KernelInfoGetAttributeArray_int64
        193: (_P, (_P, _P), lambda context, stream: _put(_P, stream, ort.of(context).stream)),  # GetGPUComputeStream
    }


def run_case(library: Library, case: dict[str, Any]) -> dict[str, Any]:
    """Calls the op of a case on CUDA. case: op, attributes, inputs (shape, type, address, or None) and streams: the
    node is called once for each, at the same time where there are several."""
    inputs = [None if given is None else Tensor(**given) for given in case["inputs"]]
    types = [None if given is None else given.type for given in inputs]
    op = next(
        op
        for op in library.ops
        if (op.name, op.provider) == (case["op"], "CUDAExecutionProvider")
        and all(type_ in (None, wanted) for type_, wanted in zip(types, op.inputs, strict=False))
    )

    def call(stream: int) -> list[Tensor | None]:
        return library.run(op, case["attributes"], inputs, stream)

    try:
        with ThreadPoolExecutor(len(case["streams"])) as threads:
            outputs = list(threads.map(call, case["streams"]))
    except Failed as error:
        return {"error": str(error)}
    return {"outputs": [[None if each is None else vars(each) for each in made] for made in outputs]}


def main() -> None:
    """In: {"library": path, "cases": [...]}; a case also has "environment" for the fake driver. Out: {"ops": [...],
    "results": [...]}, a result being outputs or an error."""
    given = json.load(sys.stdin)
    library = Library(given["library"])
    results = []
    for case in given["cases"]:
        os.environ.update(case["environment"])
        results.append(run_case(library, case))
        for name in case["environment"]:
            del os.environ[name]
    ops = [{name: value for name, value in vars(op).items() if name not in ("struct", "address")} for op in library.ops]
    json.dump({"ops": ops, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
