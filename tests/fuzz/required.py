"""What a long run of the fuzzer must have met, by the names that :func:`tests.fuzz.generate.coverage` gives."""

from __future__ import annotations

from .folds import REDUCE, SCAN
from .generate import MEMORY_KINDS
from .program import FLOATS, INTEGERS, KINDS, UNARY

_ARITHMETIC = (*FLOATS, *INTEGERS)
_LOGICAL = (*INTEGERS, "int1")
REQUIRED = [
    *(f"{op} {kind}" for op in ("add", "sub", "mul", "maximum", "minimum", "neg", "compare") for kind in _ARITHMETIC),
    *(f"{op} {kind}" for op in ("and", "or", "xor", "invert") for kind in _LOGICAL),
    *(f"{op} {kind}" for op in ("shl", "shr", "floordiv", "mod") for kind in INTEGERS),
    *(f"fma {kind}" for kind in FLOATS),
    *(f"{op} fp32" for op in ("div", *UNARY)),
    *(f"{op} {kind}" for op in ("where", "store", "load") for kind in KINDS if op == "where" or kind in MEMORY_KINDS),
    *(f"{op} {kind}" for op in ("broadcast", "expand_dims", "reshape", "trans") for kind in ("int1", *FLOATS, "int32")),
    *(f"{op} {kind}" for op in ("sum", "max", "min", "argmax", "argmin") for kind in _ARITHMETIC),
    *(f"cast {a} to {b}" for a in KINDS for b in KINDS if a != b and "bf16" not in (a, b)),
    *(f"cast {a} to bf16" for a in ("fp32", "fp16", "int32")),
    *(f"cast bf16 to {b}" for b in ("fp32", "fp16", "int32")),
    *(f"dot {which}" for which in ("fp32 ieee", "fp32 tf32", "fp16", "bf16", "int8")),
    *(f"umulhi {kind}" for kind in ("int32", "uint32", "int64")),
    *(f"bitcast {kind}" for kind in ("fp32 to int32", "int32 to fp32", "fp16 to int16")),
    *(f"cumsum {kind}" for kind in _ARITHMETIC),
    *(f"reduce {name}" for name in REDUCE),
    *(f"scan {name}" for name in SCAN),
    *(
        f"{op} {kind}"
        for op in ("gather", "join", "split")
        for kind in ("fp32", "fp16", "bf16", "int32", "int8", "int1")
    ),
    *(f"{op} {kind}" for op in ("xor_sum", "reduce_or") for kind in _LOGICAL),
    *("permute fp32", "permute int32", "abs int32", "abs fp16", "cumprod fp32", "cumprod int32", "program_id"),
    *("rand", "randint", "for", "while", "if", "load masked", "load whole", "store masked", "store whole"),
    *(f"rank {rank}" for rank in range(5)),
]
