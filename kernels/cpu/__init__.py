"""The CPU engine: Triton's IR of a kernel, compiled to native vector code by the machine's own C++ compiler."""
