"""Found by seed 36 and shrunk: a 16-bit load under a mask gave 0 where other was asked for"""

KERNEL = """import triton
import triton.language as tl


@triton.jit
def kernel(slice, x4, x5, n6, y13):
    v1 = tl.program_id(0)
    own = v1 * slice
    v11 = tl.arange(0, 4)
    v12 = tl.load(x4 + v11)
    v13 = tl.arange(0, 4)
    v14 = (tl.arange(0, 4) < n6)
    v15 = tl.load(x5 + v13, mask=v14, other=1.0)
    v16 = v12 >= v15
    v36 = tl.arange(0, 4)
    tl.store(y13 + v36 + own, v16)
"""

# the same as data: inputs and expected outputs follow from it
PROGRAM = """
{"seed": 36, "params": [{"name": "slice", "kind": "int32", "role": "scalar", "size": 0, "fill": 1264, "key": 0},
{"name": "x4", "kind": "fp16", "role": "input", "size": 4096, "fill": "whole", "key": 4}, {"name": "x5", "kind":
"fp16", "role": "input", "size": 4096, "fill": "whole", "key": 5}, {"name": "n6", "kind": "int32", "role": "scalar",
"size": 0, "fill": 0, "key": 0}, {"name": "y13", "kind": "int1", "role": "output", "size": 0, "fill": "full", "key":
13}], "body": [{"op": "program_id", "outs": ["v1"], "args": [], "attrs": {"axis": 0}, "blocks": []}, {"op": "mul",
"outs": ["own"], "args": ["v1", "slice"], "attrs": {}, "blocks": []}, {"op": "affine", "outs": ["v11"], "args": [],
"attrs": {"offset": 0, "shape": [4], "strides": [1], "starts": [0]}, "blocks": []}, {"op": "load", "outs": ["v12"],
"args": ["v11"], "attrs": {"buffer": "x4", "base": false, "mask": false, "other": false}, "blocks": []}, {"op":
"affine", "outs": ["v13"], "args": [], "attrs": {"offset": 0, "shape": [4], "strides": [1], "starts": [0]}, "blocks":
[]}, {"op": "bounds", "outs": ["v14"], "args": ["n6"], "attrs": {"shape": [4], "axes": [0]}, "blocks": []}, {"op":
"load", "outs": ["v15"], "args": ["v13", "v14"], "attrs": {"buffer": "x5", "base": false, "mask": true, "other":
false, "literal": 1.0}, "blocks": []}, {"op": "ge", "outs": ["v16"], "args": ["v12", "v15"], "attrs": {}, "blocks":
[]}, {"op": "affine", "outs": ["v36"], "args": [], "attrs": {"offset": 0, "shape": [4], "strides": [1], "starts":
[0]}, "blocks": []}, {"op": "store", "outs": [], "args": ["v36", "own", "v16"], "attrs": {"buffer": "y13", "base":
true, "mask": false}, "blocks": []}], "grid": [1], "slice": 1264, "level": 3}
"""
