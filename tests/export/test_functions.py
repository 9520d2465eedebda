"""What the bodies of our nodes have in common."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from fastattn.export import functions
from fastattn.export.ops import domain


def test_a_model_gets_the_bodies_that_its_nodes_reach_and_no_others() -> None:
    reached = {body.name for body in functions.bodies({"SmyrfAttention"})}
    assert reached >= {"SmyrfAttention", "SmyrfBlocks", "SmyrfHash", "SortedBlocks", "BlockAttention"}
    assert not reached & {"BlockAttentionWithOptions", "HashArgmax", "LshAttention"}
    assert "AtRows" in {body.name for body in functions.bodies({"LshAttention"})}, "called in the body of a loop"


@pytest.mark.parametrize("opset", [domain.OLDEST_OPSET, domain.NEWEST_OPSET])
def test_bodies_are_valid_with_every_opset(opset: int) -> None:
    bodies = functions.bodies(set(functions.FUNCTIONS), opset)
    assert {body.name for body in bodies} == set(functions.FUNCTIONS)
    assert all(body.opset_imports == {"": opset, domain.NAME: domain.VERSION} for body in bodies)
    model = helper.make_model(
        helper.make_graph([], "nothing", [], []),
        functions=[ir.serde.serialize_function(body) for body in bodies],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(domain.NAME, domain.VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
