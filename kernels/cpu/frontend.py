"""The one place that touches Triton's internals: from a kernel and a signature to the text of its TTIR.

Triton promises nothing for what is called here: ``make tritons`` runs the engine's tests with every release of
``TESTED``.
"""

from __future__ import annotations

import threading
from typing import Any

import triton

from ..errors import Unsupported

# Another release is tried all the same; an error is then put down to the release, not to the kernel.
TESTED = ("3.6", "3.7", "3.8", "3.9")

_lock = threading.Lock()  # Triton's front end is not made for several threads


def identity(kernel: Any) -> tuple[str, str]:
    """What the IR of ``kernel`` depends on beside a signature: (Triton's version, a digest of the source with all that
    it calls and the globals that it reads)."""
    return triton.__version__, kernel.cache_key


def ttir(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    """The optimised Triton IR of ``kernel``, with source locations, as text.

    types: Triton's name of each argument's type, ``constexpr`` for those in ``constants``.

    Raises:
        triton.CompilationError: the kernel is not correct Triton.
        Unsupported: this version of Triton is not one that the engine knows.
    """
    try:
        with _lock:
            return _lower(kernel, types, constants)
    except Exception as error:
        release = ".".join(triton.__version__.split(".")[:2])
        if isinstance(error, triton.CompilationError) and release in TESTED:
            raise
        raise Unsupported(
            f"the CPU engine gets no IR of {kernel.__name__} from Triton {triton.__version__} "
            f"(it is tested with {', '.join(TESTED)}): {type(error).__name__}: {error}"
        ) from error


def _lower(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    # imported here, so that a name that moved is met as an error of `ttir`
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    # Triton IR does not depend on the target, but Triton wants one to be named: here and, lest TRITON_OVERRIDE_ARCH
    # has a say, among the options. Fused multiply-adds are the C++ compiler's choice, not the IR's.
    target = GPUTarget("cuda", 80, 32)
    backend: Any = make_backend(target)
    options = backend.parse_options({"arch": "sm80", "num_warps": 4, "num_stages": 1, "enable_fp_fusion": False})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    module = source.make_ir(target, options, helpers, modules, context)
    return str(backend.make_ttir(module, {}, options, target.arch))
