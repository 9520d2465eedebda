"""The C++ of one element, or of one vector of elements, of each elementwise operation; types and literals."""

from __future__ import annotations

import math

from .ttir import Op, Value

_C_TYPES = {"f32": "float", "i1": "bool", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t"}
_INFIX = {
    "arith.addf": "+", "arith.subf": "-", "arith.mulf": "*", "arith.divf": "/", "arith.addi": "+", "arith.subi": "-",
    "arith.muli": "*", "arith.divsi": "/", "arith.remsi": "%", "arith.andi": "&", "arith.ori": "|", "arith.xori": "^",
    "arith.shli": "<<", "arith.shrsi": ">>",
}  # fmt: skip
_FUNCTIONS = {
    "arith.maxnumf": "max_number", "arith.minnumf": "min_number", "arith.maximumf": "max_nan",
    "arith.minimumf": "min_nan", "arith.maxsi": "max_signed", "arith.minsi": "min_signed", "math.exp": "power_of_e",
    "math.exp2": "power_of_two", "math.log": "logarithm", "math.log2": "logarithm2", "math.sqrt": "square_root",
    "math.absf": "absolute",
}  # fmt: skip
_COMPARISONS = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "slt": "{0} < {1}", "sle": "{0} <= {1}", "sgt": "{0} > {1}",
    "sge": "{0} >= {1}", "oeq": "{0} == {1}", "ogt": "{0} > {1}", "oge": "{0} >= {1}", "olt": "{0} < {1}",
    "ole": "{0} <= {1}", "one": "({0} < {1}) | ({0} > {1})", "ord": "({0} == {0}) & ({1} == {1})",
    # unordered ones are the ordered ones turned round: true where there is a NaN
    "une": "{0} != {1}", "uno": "({0} != {0}) | ({1} != {1})", "ult": "!({0} >= {1})", "ule": "!({0} > {1})",
    "ugt": "!({0} <= {1})", "uge": "!({0} < {1})",
}  # fmt: skip
# of integer predicates these compare without sign; on floats the same letters mean "unordered"
_UNSIGNED = {"ult", "ule", "ugt", "uge"}
# combine operation of a reduction -> the element that changes nothing
_IDENTITY = {
    "arith.addf": -0.0, "arith.addi": 0, "arith.mulf": 1.0, "arith.muli": 1, "arith.ori": 0, "arith.xori": 0,
    "arith.andi": -1, "arith.maxnumf": -math.inf, "arith.maximumf": -math.inf, "arith.minnumf": math.inf,
    "arith.minimumf": math.inf,
}  # fmt: skip


def c_type(element: str) -> str:
    """Raises Unsupported for element types that the engine lacks."""
    if element.startswith("!tt.ptr"):
        pointee = element.removeprefix("!tt.ptr<").split(",")[0].rstrip(">")
        if pointee == "i1":
            raise _no_type("a pointer to booleans")
        return c_type(pointee) + "*"
    if element not in _C_TYPES:
        raise _no_type(f"element type {element}")
    return _C_TYPES[element]


def _no_type(what: str) -> Exception:
    from ..errors import Unsupported

    return Unsupported(f"the CPU engine does not cover {what}")


def buffer_type(element: str) -> str:
    """As :func:`c_type`, but booleans are kept as masks: int32, 0 or -1."""
    return "int32_t" if element == "i1" else c_type(element)


def literal(number: bool | int | float, element: str) -> str:
    if element == "i1":
        return "true" if number else "false"
    if element == "f32":
        number = float(number)
        if math.isnan(number):
            return '__builtin_nanf("")'
        if math.isinf(number):
            return f"({'-' if number < 0 else ''}__builtin_inff())"
        return f"({number!r}f)"
    if number == -(2**63):
        return "INT64_MIN"
    return f"(({c_type(element)}){int(number)}{'LL' if element == 'i64' else ''})"


def broadcast(text: str, element: str, width: int) -> str:
    """A vector of ``width`` equal lanes."""
    if element == "i1":
        return f"broadcast_mask<{width}>({text})"
    return f"broadcast<{c_type(element)}, {width}>({text})"


def element(op: Op, operands: list[str], *, is_vector: bool) -> str:
    """The formula of an elementwise operation for scalars, or for vectors of equal width."""
    name = op.name
    if name in _INFIX:
        return f"({operands[0]} {_INFIX[name]} {operands[1]})"
    if name in _FUNCTIONS:
        return f"{_FUNCTIONS[name]}({', '.join(operands)})"
    if name in ("arith.cmpi", "arith.cmpf"):
        return _comparison(op, operands, is_vector)
    if name == "arith.select":
        return f"select({', '.join(operands)})"
    if name == "arith.negf":
        return f"(-{operands[0]})"
    if name == "math.fma":
        return f"({operands[0]} * {operands[1]} + {operands[2]})"
    if name == "math.rsqrt":
        return f"(1.0f / square_root({operands[0]}))"
    if name == "tt.addptr" and not is_vector:
        return f"({operands[0]} + (int64_t){operands[1]})"
    if name in ("arith.extsi", "arith.extui", "arith.trunci", "arith.sitofp", "arith.uitofp", "arith.fptosi"):
        return _conversion(op, operands[0], is_vector)
    raise op.unsupported("no lowering")


def _comparison(op: Op, operands: list[str], is_vector: bool) -> str:
    predicate = op.text.split(",")[0].strip()
    if predicate not in _COMPARISONS or (op.name == "arith.cmpi" and predicate in _UNSIGNED):
        raise op.unsupported(f"predicate {predicate}")
    text = _COMPARISONS[predicate].format(*operands)
    if not is_vector:
        return f"({text})"
    return f"as_mask({text.replace('!(', '~(')})"


def _conversion(op: Op, operand: str, is_vector: bool) -> str:
    source, target = op.operands[0].element, op.result.element
    unsigned = op.name in ("arith.extui", "arith.uitofp")
    if unsigned and source != "i1":
        raise op.unsupported(f"an unsigned conversion from {source}")
    if target == "i1":  # the lowest bit
        return f"as_mask(-({operand} & 1))" if is_vector else f"(({operand} & 1) != 0)"
    if source == "i1" and not is_vector:
        return f"(({c_type(target)}){'' if unsigned else '-'}(int32_t){operand})"
    if not is_vector:
        return f"(({c_type(target)}){operand})"
    return f"convert<{c_type(target)}>({'-' if source == 'i1' and unsigned else ''}{operand})"


def combine(op: Op) -> tuple[str, str]:
    """(identity, combining formula of ``a`` and ``b``) of a ``tt.reduce`` of one operand by one operation."""
    inner = op.regions[0].ops
    if len(op.operands) != 1 or len(inner) != 2 or inner[0].name not in {*_IDENTITY, "arith.maxsi", "arith.minsi"}:
        raise op.unsupported("a combine region of more than one plain operation")
    if set(inner[0].operands) != set(op.regions[0].args) or inner[1].operands != inner[0].results:
        raise op.unsupported("a combine region that is not a plain operation on its two arguments")
    value: Value = op.operands[0]
    if value.element == "i1":
        raise op.unsupported("a reduction of booleans")
    formula = element(inner[0], ["a", "b"], is_vector=True)
    if inner[0].name in ("arith.maxsi", "arith.minsi"):
        bits = int(value.element[1:])
        number = -(2 ** (bits - 1)) if inner[0].name == "arith.maxsi" else 2 ** (bits - 1) - 1
    else:
        number = _IDENTITY[inner[0].name]
    return literal(number, value.element), formula
