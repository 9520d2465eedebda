"""Our ops in ONNX, one file an op: a function of domain ``fastattn``, whose body of standard ops runs anywhere.

A library that registers a kernel for (domain, name) replaces the body; nested functions may be replaced one by one.

A file's ``OP`` (:class:`fastattn.export.ops.node.ExportedOp`) names its functions and, where a torch op becomes such a
node, the translation; ``export/functions.py`` lists the files. A function's docstring is its signature, for whoever
writes a kernel for it.
"""

from __future__ import annotations
