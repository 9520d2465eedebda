"""What may stand beside an operation's operands and types. Anything else may change what it means, so it is refused:
a later Triton that says more must not be taken for one that says less."""

from __future__ import annotations

import re

# Where it is not just its operands: what is printed outside of braces, with each operand as %.
_PRINTED = {
    "arith.constant": r".*",  # all of it is the value
    "arith.cmpf": r"\w+, %, %",
    "arith.cmpi": r"\w+, %, %",
    "scf.condition": r"\(%\)(?: %(?:, %)*)?",
    "tt.clampf": r"%, %, %, propagateNan = (?:none|all)",
    "tt.dot": r"%, %, %(?:, inputPrecision = \w+)?",
    "tt.elementwise_inline_asm": r'"" %(?:, %)*',
    "tt.fp_to_fp": r"%(?:, rounding = \w+)?",
    "tt.gather": r"%\[%\]",
    "tt.get_num_programs": r"[xyz]",
    "tt.get_program_id": r"[xyz]",
    "tt.load": r"%(?:, %)*(?: cacheModifier = \w+)?(?: evictionPolicy = \w+)?",
    "tt.reduce": r"axis = \d+ : i32",
    "tt.reshape": r"%(?: allow_reorder)?",
    "tt.scan": r"axis = \d+ : i32, reverse = (?:true|false)",
    "tt.store": r"%, %(?:, %)?(?: cacheModifier = \w+)?(?: evictionPolicy = \w+)?",
}
# The attributes in braces; a name with a dot belongs to no operation and is a hint, such as tt.divisibility.
_ATTRIBUTES = {
    "tt.elementwise_inline_asm": {"constraints", "packed_element", "pure"},
    "tt.expand_dims": {"axis"},
    "tt.extern_elementwise": {"libname", "libpath", "pure", "symbol"},
    "tt.gather": {"axis"},
    "tt.load": {"cachePolicy", "isVolatile"},
    "tt.make_range": {"start", "end"},
    "tt.store": {"cachePolicy"},
    "tt.trans": {"order"},
}
_OPERAND = re.compile(r"%[\w$.-]+(?:#\d+)?")
_LICENCE = re.compile(r" (?:nneg|exact|(?:overflow|fastmath)<[^<>]*>)$")  # allows more, asks nothing


def unknown(name: str, text: str) -> str:
    """The part of an operation's text (as ``Op.text``) that has no form of the tables above; empty where all has."""
    before, brace, rest = _OPERAND.sub("%", text).partition("{")
    attributes, _, after = rest.rpartition("}")
    printed = _LICENCE.sub("", " ".join(f"{before} {after}".split()))
    if not re.fullmatch(_PRINTED.get(name, r"(?:%(?:, %)*)?"), printed):
        return printed
    known = _ATTRIBUTES.get(name, set())
    return ", ".join(key for key in _names(attributes) if "." not in key and key not in known) if brace else ""


def _names(attributes: str) -> list[str]:
    """``["axis", "order"]`` of ``axis = 1 : i32, order = array<i32: 1, 0>``."""
    while (flat := re.sub(r"<[^<>]*>", "", attributes)) != attributes:
        attributes = flat
    return [part.partition(" = ")[0] for part in flat.split(", ")]
