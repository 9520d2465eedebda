"""The one place that touches Triton's internals: from a kernel and a signature to the text of its TTIR."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from ..errors import Unsupported

# Triton IR does not depend on the target; Triton only wants one to be named.
_TARGET = GPUTarget("cuda", 80, 32)


def ttir(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    """The optimised Triton IR of ``kernel``, with source locations, as text.

    types: Triton's name of each argument's type, ``constexpr`` for those in ``constants``.
    """
    try:
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        backend: Any = make_backend(_TARGET)
        # fma would be formed by the C++ compiler or not at all: keep the IR free of the target's choices
        options = backend.parse_options({"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        helpers = backend.get_codegen_implementation(options)
        module = source.make_ir(_TARGET, options, helpers, backend.get_module_map(), context)
        module = backend.make_ttir(module, {}, options, _TARGET.arch)
    except (AttributeError, TypeError, ImportError) as error:
        raise Unsupported(f"this version of Triton is not one the CPU engine knows: {error}") from error
    return str(module)
