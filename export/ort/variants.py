"""A kernel compiled for some launches, as ``launch.h`` describes it: written as tables of C++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastattn.kernels.launch import Launch, signature

_TYPES = {"fp32": "fp32", "fp16": "fp16", "i32": "int32", "i64": "int64", "i1": "boolean"}
# constants that a build chooses and no launch asks for
_CHOSEN = frozenset({"PRECISION", "BLOCK_R"})
# those that follow from another constant
_DERIVED = frozenset({"BLOCK_D", "BLOCK_DV", "BLOCK_DIM"})


@dataclass(frozen=True)
class Variant:
    """kernel: its name in ``KERNELS`` of its room. launch: one that it serves, whose tensors need no memory."""

    kernel: str
    launch: Launch

    def described(self) -> str:
        """In words, for whoever watches a build."""
        types, constants = signature(self.launch)
        words = [f"{name} {kind}" for name, kind in types.items() if kind[0] == "*"]
        words += [f"{name}={value}" for name, value in constants.items() if value is not None and name not in _CHOSEN]
        return f"{self.kernel}({', '.join(words)})"

    def table(self, name: str, multiples: dict[str, int] | None = None) -> tuple[str, str]:
        """(arrays of C++ whose names begin with ``name``, an initialiser of a ``Variant`` that refers to them).

        multiples: what the value of a parameter must divide by, where the binary counts on it.
        """
        types, constants = signature(self.launch)
        parameters = [
            f'{{"{argument}", Type::{_TYPES[kind.removeprefix("*")]}, {_bool(kind[0] == "*")}, '
            f"{(multiples or {}).get(argument, 1)}}}"
            for argument, kind in types.items()
            if kind != "constexpr"
        ]
        blocks = {x: value for x, value in constants.items() if self._is_block(x)}
        given = {x: v for x, v in constants.items() if v is not None and x not in blocks and x not in _CHOSEN}
        arrays = (
            _array(f"{name}_parameters", "Parameter", parameters)
            + _array(f"{name}_constants", "Constant", [_constant(*item) for item in given.items()])
            + _array(f"{name}_blocks", "Constant", [_constant(*item) for item in blocks.items()])
        )
        sizes = f"{name}_parameters, {len(parameters)}, {name}_constants, {len(given)}, {name}_blocks, {len(blocks)}"
        return arrays, f'{{"{self.kernel}", {sizes}}}'

    def _is_block(self, name: str) -> bool:
        return name in self.launch.config.blocks or name in _DERIVED


def _array(name: str, kind: str, items: list[str]) -> str:
    # an array of C++ has an element at least
    return f"const {kind} {name}[] = {{{', '.join(items) or '{}'}}};\n"


def _constant(name: str, value: Any) -> str:
    return f'{{"{name}", 0, "{value}"}}' if isinstance(value, str) else f'{{"{name}", {int(value)}}}'


def _bool(flag: bool) -> str:
    return "true" if flag else "false"
