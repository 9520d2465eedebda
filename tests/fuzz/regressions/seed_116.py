"""Found by seed 116 and shrunk: y13[1] is 0, expected 2 within 0 (1 elements differ)"""

KERNEL = """import triton
import triton.language as tl


@triton.jit
def kernel(y13):
    v1 = tl.full([], 1, tl.int32)
    v15 = tl.full([2, 2], 2, tl.uint16)
    v16, v17 = tl.split(v15)
    v41 = tl.full([1], 1, tl.int32)
    v42 = tl.gather(v17, v41, axis=0)
    v76 = v42.to(tl.int32)
    v77 = tl.arange(0, 1)
    tl.store(y13 + v77 + v1, v76)
"""

# the same as data: inputs and expected outputs follow from it
PROGRAM = """
{"seed": 116, "params": [{"name": "y13", "kind": "int32", "role": "output", "size": 0, "fill": "full", "key": 13}],
"body": [{"op": "full", "outs": ["v1"], "args": [], "attrs": {"shape": [], "value": 1, "kind": "int32"}, "blocks":
[]}, {"op": "full", "outs": ["v15"], "args": [], "attrs": {"shape": [2, 2], "value": 2, "kind": "uint16"}, "blocks":
[]}, {"op": "split", "outs": ["v16", "v17"], "args": ["v15"], "attrs": {}, "blocks": []}, {"op": "full", "outs":
["v41"], "args": [], "attrs": {"shape": [1], "value": 1, "kind": "int32"}, "blocks": []}, {"op": "gather", "outs":
["v42"], "args": ["v17", "v41"], "attrs": {"axis": 0}, "blocks": []}, {"op": "cast", "outs": ["v76"], "args": ["v42"],
"attrs": {"kind": "int32"}, "blocks": []}, {"op": "affine", "outs": ["v77"], "args": [], "attrs": {"offset": 0,
"shape": [1], "strides": [1], "starts": [0]}, "blocks": []}, {"op": "store", "outs": [], "args": ["v77", "v1", "v76"],
"attrs": {"buffer": "y13", "base": true, "mask": false}, "blocks": []}], "grid": [1], "slice": 128, "level": 0}
"""
