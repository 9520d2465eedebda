"""Our ops in ONNX, one file an op: a function of domain ``fastattn``, whose body of standard ops runs anywhere.

A library that registers a kernel for (domain, name) replaces the body; nested functions may be replaced one by one.
"""

from __future__ import annotations
