"""Random kernels: the CPU engine and Triton's interpreter give what the evaluation in float64 and integers says."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fastattn.kernels.cpu import machine
from fastattn.kernels.cpu.build import find_compiler
from tests.fuzz import values
from tests.fuzz.check import MOST_UNKNOWN, REGRESSIONS, Report, check, door_failure, failing
from tests.fuzz.compare import difference
from tests.fuzz.evaluate import Ambiguous, Evaluator
from tests.fuzz.folds import cumulative, dot, reduce
from tests.fuzz.generate import generate
from tests.fuzz.grammar import STATEMENTS
from tests.fuzz.interpreter import Interpreter
from tests.fuzz.program import COMBINES, Program, source, walk
from tests.fuzz.required import REQUIRED
from tests.fuzz.shrink import shrink, swept
from tests.fuzz.workers import in_processes

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")
FIRST_SEED, PROGRAMS, BATCH = 1, 150, 10


@pytest.fixture(scope="module")
def interpreter():
    with Interpreter() as running:
        yield running


@needs_compiler
@pytest.mark.parametrize("first", range(FIRST_SEED, FIRST_SEED + PROGRAMS, BATCH))
def test_engine_and_interpreter_give_what_the_definition_says(first, interpreter):
    print(f"seeds {first} to {first + BATCH - 1}")
    report = check(range(first, first + BATCH), interpreter)
    assert not report.failures, "\n\n".join(map(str, report.failures))
    assert report.checked + report.dropped == BATCH
    assert report.checked > BATCH // 2


# ---- what failed once


def _regressions() -> list[Path]:
    return sorted(REGRESSIONS.glob("*.py"))


def _read(path: Path) -> tuple[str, Program]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.KERNEL, Program.from_data(json.loads(module.PROGRAM))


@pytest.mark.parametrize("path", _regressions(), ids=lambda path: path.stem)
def test_a_kept_program_is_the_kernel_that_its_file_shows(path):
    kernel, program = _read(path)
    assert source(program) == kernel


@needs_compiler
@pytest.mark.parametrize("level", range(len(machine.supported_levels())))
def test_what_failed_once_is_right_at_every_level(level):
    programs = [_read(path)[1] for path in _regressions()]
    for program in programs:
        program.level = level
    assert not any(failing(programs)), [p.seed for p, wrong in zip(programs, failing(programs), strict=True) if wrong]


@needs_compiler
@pytest.mark.parametrize("path", _regressions()[:2], ids=lambda path: path.stem)
def test_what_failed_once_is_right_through_launch(path):
    assert door_failure(_read(path)[1]) == ""


# ---- the fuzzer itself


def test_a_program_is_a_function_of_its_seed():
    assert generate(7).to_data() == generate(7).to_data() != generate(8).to_data()
    assert source(generate(7)) == source(Program.from_data(json.loads(json.dumps(generate(7).to_data()))))


def test_few_programs_are_dropped_and_little_of_the_others_is_unknown():
    dropped, unknown = 0, []
    for seed in range(60):
        run = Evaluator(generate(seed))
        try:
            run.run()
        except Ambiguous:
            dropped += 1
        else:
            dropped += run.unknown_share > MOST_UNKNOWN
            unknown.append(run.unknown_share)
    assert dropped <= 6
    assert np.mean(unknown) < 0.1


def test_a_few_hundred_programs_hold_most_of_the_covered_operations():
    ops = {node.op for seed in range(150) for node in walk(generate(seed).body)}
    wanted = {name.split()[0] for name in REQUIRED} - {"compare", "rank"}
    assert wanted - ops <= {"reduce_or", "erf", "ceil", "floor", "cumprod"}
    assert {"for", "while", "if", "dot", "scan", "reduce", "gather", "join", "split"} <= ops
    assert len(STATEMENTS) > 25


def _first_with(op: str) -> Program:
    """The first program in which something is made of what the operation gives."""
    for seed in range(200):
        program = swept(generate(seed))
        if any(node.op == op for node in walk(program.body)):
            return program
    raise AssertionError(op)


def test_one_wrong_element_is_found_and_a_bound_is_not_crossed():
    run = Evaluator(_first_with("dot"))
    outputs = run.run()
    name = next(name for name, stored in run.stored.items() if stored.any())
    got = {key: value.data.copy() for key, value in outputs.items()}
    assert difference(got, outputs) is None
    at = int(np.argmax(run.stored[name] & ~np.isinf(outputs[name].error)))
    got[name][at] += 2 * outputs[name].error[at] + 1
    found = difference(got, outputs)
    assert found is not None and (found.buffer, found.at, found.count) == (name, at, 1)


@pytest.mark.parametrize("op", ["dot", "while", "gather"])
def test_shrinking_leaves_little_more_than_what_fails(op):
    program = _first_with(op)
    small = shrink(program, lambda some: [any(node.op == op for node in walk(p.body)) for p in some], seconds=120)
    assert any(node.op == op for node in walk(small.body))
    assert len(list(walk(small.body))) < 20
    Evaluator(small).run()


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_rounding_of_the_evaluation_is_that_of_torch(kind):
    x = np.random.default_rng(0).normal(size=4000) * 10.0 ** np.random.default_rng(1).integers(-45, 39, 4000)
    x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8]])
    x = x.astype(np.float32).astype(np.float64)  # torch has no way from float64 to bfloat16 but through float32
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    np.testing.assert_array_equal(values.rounded(x, kind), torch.from_numpy(x).to(dtype).double().numpy())


def _one(x: float) -> values.Value:
    return values.exact("fp32", [x])


@pytest.mark.parametrize(
    ("x", "y", "z"), [(-3e38, -1.41, -np.inf), (3e38, 2.0, -3e38), (-3e38, 1.41, np.inf), (-3e38, 2.0, 3e38)]
)
@np.errstate(invalid="ignore")
def test_a_product_or_sum_that_overflows_beside_its_opposite_is_unknown(x, y, z):
    """float64 knows it; in fp32 it is NaN or an infinity, or the number itself where the two were fused."""
    assert values.unknown(values.fma(_one(x), _one(y), _one(z))).all()
    assert values.unknown(values.binary_float("add", values.binary_float("mul", _one(x), _one(y)), _one(z))).all()
    row, column = values.exact("fp32", [[x, 1.0]]), values.exact("fp32", [[y], [z]])
    assert values.unknown(dot(row, column)).all()
    start = values.exact("fp32", [[z]])
    assert values.unknown(dot(*(values.exact("fp32", [[number]]) for number in (x, y)), start)).all()
    terms = values.exact("fp32", [x, x, z])
    assert values.unknown(reduce("sum", terms, 0, False)).all()
    assert values.unknown(cumulative("cumsum", terms, 0, False))[2]


@pytest.mark.parametrize(("x", "y", "z"), [(np.inf, 2.0, -1e38), (np.nan, -3e38, -3e38), (-np.inf, 1.0, np.inf)])
@np.errstate(invalid="ignore")
def test_what_no_order_of_additions_changes_is_known(x, y, z):
    row, column = values.exact("fp32", [[x, 1.0]]), values.exact("fp32", [[y], [z]])
    for known in (values.fma(_one(x), _one(y), _one(z)), dot(row, column)):
        assert not known.error.any()
        np.testing.assert_array_equal(known.data.ravel(), [x * y + z])


def test_every_combine_function_takes_as_many_operands_twice_as_it_gives():
    for operands, text in COMBINES.values():
        head = text.splitlines()[0]
        assert head.count(",") + 1 == 2 * operands


def _doubled_but_5_and_6(number: int) -> int:
    if number in (5, 6):
        os._exit(1)
    return 2 * number


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the test's processes are forks")
def test_of_the_processes_that_die_the_batches_are_named_and_the_others_are_done():
    found = dict(in_processes(_doubled_but_5_and_6, range(12), 2, method="fork"))
    assert found == {number: None if number in (5, 6) else 2 * number for number in range(12)}


def test_reports_add_up():
    total, one = Report(), Report(checked=2, dropped=1, interpreted=1)
    one.met["dot fp32"] = 2
    for _ in range(2):
        total.add(one)
    assert (total.checked, total.dropped, total.interpreted, total.met["dot fp32"]) == (4, 2, 2, 4)
