"""Found by seed 31 and shrunk: other of a 16-bit load was lost on the way to a product"""

KERNEL = """import triton
import triton.language as tl


@triton.jit
def kernel(slice, x4, n5, y13):
    v1 = tl.program_id(0)
    v2 = tl.full([], 2, tl.int32)
    v3 = tl.program_id(1)
    v4 = v3 * v2
    v5 = v1 + v4
    own = v5 * slice
    v34 = tl.full([4, 32], 1.0, tl.float16)
    v36 = tl.arange(0, 32)[:, None] * 4 + tl.arange(0, 4)[None, :]
    v37 = (tl.arange(0, 32)[:, None] < n5)
    v38 = tl.broadcast_to(v37, [32, 4])
    v40 = tl.full([32, 4], 1.0, tl.float16)
    v41 = tl.load(x4 + v36, mask=v38, other=v40)
    v44 = tl.full([4, 4], 1.0, tl.float32)
    v45 = tl.dot(v34, v41, v44)
    v80 = tl.full([], 1, tl.int32)
    v81 = v80 + tl.arange(0, 4)[:, None] * 4 + tl.arange(2, 6)[None, :]
    tl.store(y13 + v81 + own, v45)
"""

# the same as data: inputs and expected outputs follow from it
PROGRAM = """
{"seed": 31, "params": [{"name": "slice", "kind": "int32", "role": "scalar", "size": 0, "fill": 144, "key": 0},
{"name": "x4", "kind": "fp16", "role": "input", "size": 4096, "fill": "normal special", "key": 4}, {"name": "n5",
"kind": "int32", "role": "scalar", "size": 0, "fill": 4, "key": 0}, {"name": "y13", "kind": "fp32", "role": "output",
"size": 0, "fill": "whole", "key": 13}], "body": [{"op": "program_id", "outs": ["v1"], "args": [], "attrs": {"axis":
0}, "blocks": []}, {"op": "full", "outs": ["v2"], "args": [], "attrs": {"shape": [], "value": 2, "kind": "int32"},
"blocks": []}, {"op": "program_id", "outs": ["v3"], "args": [], "attrs": {"axis": 1}, "blocks": []}, {"op": "mul",
"outs": ["v4"], "args": ["v3", "v2"], "attrs": {}, "blocks": []}, {"op": "add", "outs": ["v5"], "args": ["v1", "v4"],
"attrs": {}, "blocks": []}, {"op": "mul", "outs": ["own"], "args": ["v5", "slice"], "attrs": {}, "blocks": []}, {"op":
"full", "outs": ["v34"], "args": [], "attrs": {"shape": [4, 32], "value": 1.0, "kind": "fp16"}, "blocks": []}, {"op":
"affine", "outs": ["v36"], "args": [], "attrs": {"offset": 0, "shape": [32, 4], "strides": [4, 1], "starts": [0, 0]},
"blocks": []}, {"op": "bounds", "outs": ["v37"], "args": ["n5"], "attrs": {"shape": [32, 4], "axes": [0]}, "blocks":
[]}, {"op": "broadcast", "outs": ["v38"], "args": ["v37"], "attrs": {"shape": [32, 4]}, "blocks": []}, {"op": "full",
"outs": ["v40"], "args": [], "attrs": {"shape": [32, 4], "value": 1.0, "kind": "fp16"}, "blocks": []}, {"op": "load",
"outs": ["v41"], "args": ["v36", "v38", "v40"], "attrs": {"buffer": "x4", "base": false, "mask": true, "other": true},
"blocks": []}, {"op": "full", "outs": ["v44"], "args": [], "attrs": {"shape": [4, 4], "value": 1.0, "kind": "fp32"},
"blocks": []}, {"op": "dot", "outs": ["v45"], "args": ["v34", "v41", "v44"], "attrs": {"precision": ""}, "blocks":
[]}, {"op": "full", "outs": ["v80"], "args": [], "attrs": {"shape": [], "value": 1, "kind": "int32"}, "blocks": []},
{"op": "affine", "outs": ["v81"], "args": ["v80"], "attrs": {"offset": 0, "shape": [4, 4], "strides": [4, 1],
"starts": [0, 2]}, "blocks": []}, {"op": "store", "outs": [], "args": ["v81", "own", "v45"], "attrs": {"buffer":
"y13", "base": true, "mask": false}, "blocks": []}], "grid": [2, 2], "slice": 144, "level": 1}
"""
