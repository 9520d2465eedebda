"""The C++ of one element, or of one vector of elements, of each elementwise operation; types and literals.

An fp16 or bf16 number is computed as a float that is rounded after each operation, which for these formats gives what
the narrow operation itself would; in memory and in buffers it has its 16 bits. A boolean is a ``bool``, in vectors and
buffers an int32 that is 0 or -1.
"""

from __future__ import annotations

import math
import re

from ..errors import Unsupported
from .ttir import Op

HALVES = ("f16", "bf16")
_REGISTER_TYPES = {
    "f16": "float", "bf16": "float", "f32": "float", "i1": "bool", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t",
    "i64": "int64_t",
}  # fmt: skip
_INFIX = {
    "arith.addf": "+", "arith.subf": "-", "arith.mulf": "*", "arith.divf": "/", "tt.precise_divf": "/",
    "arith.addi": "+", "arith.subi": "-", "arith.muli": "*", "arith.andi": "&", "arith.ori": "|", "arith.xori": "^",
    "arith.shli": "<<", "arith.shrsi": ">>",
}  # fmt: skip
# on booleans, of which true is -1 to signed and 1 to unsigned comparisons
_BOOLEAN_INFIX = {
    "arith.addi": "^", "arith.subi": "^", "arith.muli": "&", "arith.andi": "&", "arith.ori": "|", "arith.xori": "^",
    "arith.maxui": "|", "arith.minui": "&", "arith.maxsi": "&", "arith.minsi": "|",
}  # fmt: skip
_FUNCTIONS = {
    "arith.maxnumf": "max_number", "arith.minnumf": "min_number", "arith.maximumf": "max_nan",
    "arith.minimumf": "min_nan", "arith.maxsi": "max_signed", "arith.minsi": "min_signed",
    "arith.maxui": "max_unsigned", "arith.minui": "min_unsigned", "arith.divsi": "divide",
    "arith.divui": "divide_unsigned", "arith.remsi": "remainder", "arith.remui": "remainder_unsigned",
    "arith.remf": "float_remainder", "arith.shrui": "shift_right_unsigned", "tt.mulhiui": "multiply_high_unsigned",
    "math.exp": "power_of_e", "math.exp2": "power_of_two", "math.log": "logarithm", "math.log2": "logarithm2",
    "math.sqrt": "square_root", "tt.precise_sqrt": "square_root", "math.rsqrt": "reciprocal_root",
    "math.sin": "sine", "math.cos": "cosine", "math.erf": "error_function", "math.floor": "floor_of",
    "math.ceil": "ceil_of", "math.absf": "absolute", "math.absi": "absolute", "math.ctpop": "population_count",
}  # fmt: skip
# operations of these names whose result may lie between two numbers of a 16-bit format
_ROUNDED = {
    "arith.addf", "arith.subf", "arith.mulf", "arith.divf", "tt.precise_divf", "arith.remf", "math.fma", "math.exp",
    "math.exp2", "math.log", "math.log2", "math.sqrt", "tt.precise_sqrt", "math.rsqrt", "math.sin", "math.cos",
    "math.erf", "arith.sitofp", "arith.uitofp", "arith.truncf",
}  # fmt: skip
_CONVERSIONS = {
    "arith.extsi", "arith.extui", "arith.trunci", "arith.sitofp", "arith.uitofp", "arith.fptosi", "arith.fptoui",
    "arith.extf", "arith.truncf", "tt.fp_to_fp",
}  # fmt: skip
_SIGNED_COMPARISONS = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "slt": "{0} < {1}", "sle": "{0} <= {1}", "sgt": "{0} > {1}",
    "sge": "{0} >= {1}",
}  # fmt: skip
_UNSIGNED_COMPARISONS = {
    "ult": "as_unsigned({0}) < as_unsigned({1})", "ule": "as_unsigned({0}) <= as_unsigned({1})",
    "ugt": "as_unsigned({0}) > as_unsigned({1})", "uge": "as_unsigned({0}) >= as_unsigned({1})",
}  # fmt: skip
_FLOAT_COMPARISONS = {
    "oeq": "{0} == {1}", "ogt": "{0} > {1}", "oge": "{0} >= {1}", "olt": "{0} < {1}", "ole": "{0} <= {1}",
    "one": "({0} < {1}) | ({0} > {1})", "ord": "({0} == {0}) & ({1} == {1})",
    # unordered ones are the ordered ones turned round: true where there is a NaN
    "une": "{0} != {1}", "uno": "({0} != {0}) | ({1} != {1})", "ult": "!({0} >= {1})", "ule": "!({0} > {1})",
    "ugt": "!({0} <= {1})", "uge": "!({0} < {1})", "ueq": "!(({0} < {1}) | ({0} > {1}))",
}  # fmt: skip
# how other languages' functions are called where Triton has no operation of its own
_POPULATION_COUNTS = {"__nv_popc", "__nv_popcll", "__ockl_popcount_u32", "__ockl_popcount_u64"}

# every operation with a formula, and those whose cost is worth a buffer
ELEMENTWISE = frozenset(
    {*_INFIX, *_BOOLEAN_INFIX, *_FUNCTIONS, *_CONVERSIONS, "arith.cmpi", "arith.cmpf", "arith.select", "arith.negf",
     "arith.bitcast", "math.fma", "tt.bitcast", "tt.addptr", "tt.clampf", "tt.extern_elementwise",
     "tt.elementwise_inline_asm"}
)  # fmt: skip
COSTLY = frozenset(
    {"math.exp", "math.exp2", "math.log", "math.log2", "math.sqrt", "math.rsqrt", "math.sin", "math.cos", "math.erf",
     "tt.precise_sqrt", "tt.precise_divf", "arith.divf", "arith.remf", "arith.divsi", "arith.divui", "arith.remsi",
     "arith.remui", "tt.mulhiui"}
)  # fmt: skip


# ---- types


def is_pointer(element: str) -> bool:
    return element.startswith("!tt.ptr")


def register_type(element: str) -> str:
    """The C++ type of a scalar; a vector has lanes of :func:`lane_type`."""
    return _memory_type(element) if is_pointer(element) else _lookup(element)


def lane_type(element: str) -> str:
    return "int32_t" if element == "i1" else register_type(element)


def buffer_type(element: str) -> str:
    """The type of a buffer's elements."""
    return "int32_t" if element == "i1" else _memory_type(element)


def buffer_bytes(element: str) -> int:
    """The size of a buffer's element."""
    return 4 if element == "i1" else bits(element) // 8


def vector_type(element: str, width: int | str) -> str:
    return f"V<{lane_type(element)}, {width}>"


def _memory_type(element: str) -> str:
    if is_pointer(element):
        pointee = element.removeprefix("!tt.ptr<").split(",")[0].rstrip(">")
        # Triton reads and writes booleans through pointers to bytes
        return "int8_t*" if pointee == "i1" else f"{_memory_type(pointee)}*"
    return element if element in HALVES else _lookup(element)


def _lookup(element: str) -> str:
    if element not in _REGISTER_TYPES:
        raise Unsupported(f"the CPU engine does not cover element type {element}")
    return _REGISTER_TYPES[element]


def bits(element: str) -> int:
    return int(re.sub(r"\D", "", element))


def literal(number: bool | int | float, element: str) -> str:
    if element == "i1":
        return "true" if number else "false"
    if register_type(element) == "float":
        number = float(number)
        if math.isnan(number):
            return '__builtin_nanf("")'
        if math.isinf(number):
            return f"({'-' if number < 0 else ''}__builtin_inff())"
        return f"({number!r}f)"
    if number == -(2**63):
        return "INT64_MIN"
    return f"(({register_type(element)}){int(number)}{'LL' if element == 'i64' else ''})"


def broadcast(text: str, element: str, width: int | str) -> str:
    """A vector of ``width`` equal lanes."""
    if element == "i1":
        return f"broadcast_mask<{width}>({text})"
    return f"broadcast<{register_type(element)}, {width}>({text})"


# ---- formulas


def element(op: Op, operands: list[str], *, is_vector: bool) -> str:
    """The formula of an elementwise operation for scalars, or for vectors of equal width."""
    text = _formula(op, operands, is_vector)
    kind = op.result.element
    if kind in HALVES and op.name in _ROUNDED:
        return f"round_to<{kind}>({text})"
    return text


def _formula(op: Op, operands: list[str], is_vector: bool) -> str:
    name, kind = op.name, op.result.element
    if kind == "i1" and name in _BOOLEAN_INFIX:
        return f"({operands[0]} {_BOOLEAN_INFIX[name]} {operands[1]})"
    if name in ("arith.cmpi", "arith.cmpf"):
        return _comparison(op, operands, is_vector)
    if name in _CONVERSIONS:
        return _conversion(op, operands[0], is_vector)
    if name == "arith.select":
        return f"select({', '.join(operands)})"
    if name in ("tt.bitcast", "arith.bitcast"):
        return _bitcast(op, operands[0], is_vector)
    if name == "tt.addptr" and not is_vector:
        return f"({operands[0]} + (int64_t){operands[1]})"
    if kind == "i1" or is_pointer(kind):
        raise op.unsupported(f"a result of type {kind}")
    if name in _INFIX:
        return f"({operands[0]} {_INFIX[name]} {operands[1]})"
    if name in _FUNCTIONS:
        return f"{_FUNCTIONS[name]}({', '.join(operands)})"
    if name == "arith.negf":
        return f"(-{operands[0]})"
    if name == "math.fma":
        return f"({operands[0]} * {operands[1]} + {operands[2]})"
    if name == "tt.clampf":
        keep = "nan" if "all" in op.text.rpartition("propagateNan")[2] else "number"
        return f"min_{keep}(max_{keep}({operands[0]}, {operands[1]}), {operands[2]})"
    if name in ("tt.extern_elementwise", "tt.elementwise_inline_asm"):
        return _foreign(op, operands)
    raise op.unsupported("no lowering")


def _comparison(op: Op, operands: list[str], is_vector: bool) -> str:
    predicate = op.text.split(",")[0].strip()
    table = _FLOAT_COMPARISONS if op.name == "arith.cmpf" else _SIGNED_COMPARISONS | _UNSIGNED_COMPARISONS
    if predicate not in table:
        raise op.unsupported(f"predicate {predicate}")
    if op.operands[0].element == "i1" and not is_vector:  # as in vectors: true is -1
        operands = [f"(-(int32_t){x})" for x in operands]
    text = table[predicate].format(*operands)
    if not is_vector:
        return f"({text})"
    return f"as_mask({text.replace('!(', '~(')})"


def _conversion(op: Op, operand: str, is_vector: bool) -> str:
    source, target = op.operands[0].element, op.result.element
    if source not in _REGISTER_TYPES:
        raise op.unsupported(f"a conversion from {source}")
    kind = register_type(target)
    if op.name in ("arith.extf", "arith.truncf"):
        return operand  # both are floats here; element() rounds
    if op.name == "tt.fp_to_fp":
        return _rounding(op, operand, source, target)
    unsigned = op.name in ("arith.extui", "arith.uitofp")
    if source == "i1":  # -1 in vectors
        if is_vector:
            return f"convert<{lane_type(target)}>({'-' if unsigned else ''}{operand})"
        return f"(({kind}){'' if unsigned else '-'}(int32_t){operand})"
    if target == "i1":
        if op.name != "arith.trunci":
            raise op.unsupported(f"a conversion from {source} to i1")
        return f"as_mask(-({operand} & 1))" if is_vector else f"(({operand} & 1) != 0)"
    if unsigned:
        return f"convert_unsigned<{kind}>({operand})"
    if op.name == "arith.fptoui":
        return f"to_unsigned_integer<{kind}>({operand})"
    return f"convert<{kind}>({operand})" if is_vector else f"(({kind}){operand})"


def _rounding(op: Op, operand: str, source: str, target: str) -> str:
    if {source, target} - {"f16", "bf16", "f32"}:
        raise op.unsupported(f"a conversion from {source} to {target}")
    if target == "f32":
        return operand
    if "rounding = rtz" in op.text:
        return f"round_toward_zero<{target}>({operand})"
    return f"round_to<{target}>({operand})"


def _bitcast(op: Op, operand: str, is_vector: bool) -> str:
    source, target = op.operands[0].element, op.result.element
    if is_pointer(target) and not is_vector:
        return f"(({register_type(target)}){operand})"
    if is_pointer(source) or is_pointer(target) or "i1" in (source, target) or bits(source) != bits(target):
        raise op.unsupported(f"{source} as {target}")
    if source == target:
        return operand
    packed = f"pack<{source}>({operand})" if source in HALVES else f"as_unsigned({operand})"
    if target in HALVES:
        return f"unpack<{target}>({packed})"
    return f"bits_to<{register_type(target)}>({packed})"


def _foreign(op: Op, operands: list[str]) -> str:
    """Population count in the languages of CUDA's and AMD's libraries and of PTX."""
    said = op.strings[0].strip() if op.strings else ""
    symbol = re.search(r'symbol = ""', op.text)
    names = set(op.strings)
    is_count = bool(symbol and names & _POPULATION_COUNTS) or re.fullmatch(r"popc\.b(32|64) \$0, \$1;", said)
    if not is_count or len(operands) != 1:
        raise op.unsupported(f"foreign code {', '.join(op.strings)[:80]!r}")
    count = f"population_count({operands[0]})"
    source, target = op.operands[0].element, op.result.element
    return count if source == target else f"convert_unsigned<{register_type(target)}>({count})"
