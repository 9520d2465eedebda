"""``libfastattn_ort``: our kernels as custom ops of ONNX Runtime, in one shared object that any session can register.

``launch.h`` is the middle: ops (``block_attention.cc``, ...) check their inputs and describe launches, a device runs
them. ``variants.py`` says what is compiled, ``needs.py`` what a model asks for, ``library.py`` builds.
"""

from __future__ import annotations
