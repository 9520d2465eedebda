"""Which instruction sets the engine takes a processor for."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.kernels.cpu import build, machine
from fastattn.kernels.cpu.machine import AMX_BF16, AVX2, AVX512, AVX512_BF16, BASELINE

# what Linux says of them, as far as it matters here
HASWELL = "sse2 ssse3 sse4_2 movbe popcnt f16c abm bmi1 avx2 bmi2 fma"
KNIGHTS_LANDING = f"{HASWELL} avx512f avx512cd avx512er avx512pf"
SKYLAKE_X = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
CASCADE_LAKE = f"{SKYLAKE_X} avx512_vnni"
ZEN_4 = f"{CASCADE_LAKE} avx512_bf16 avx512vbmi avx512_vpopcntdq"
SAPPHIRE_RAPIDS = f"{ZEN_4} amx_bf16 amx_tile amx_int8"


@pytest.fixture
def processor(monkeypatch):
    def pretend(features: str, kind: str = "x86_64") -> None:
        monkeypatch.setattr(machine, "features", lambda: frozenset(features.split()))
        monkeypatch.setattr(machine, "may_use_amx", lambda: True)
        monkeypatch.setattr(platform, "machine", lambda: kind)

    return pretend


@pytest.mark.parametrize(
    "features, levels",
    [
        (SAPPHIRE_RAPIDS, [AMX_BF16, AVX512_BF16, AVX512, AVX2, BASELINE]),
        (ZEN_4, [AVX512_BF16, AVX512, AVX2, BASELINE]),
        (CASCADE_LAKE, [AVX512, AVX2, BASELINE]),
        (SKYLAKE_X, [AVX512, AVX2, BASELINE]),
        (KNIGHTS_LANDING, [AVX2, BASELINE]),
        (HASWELL, [AVX2, BASELINE]),
        (HASWELL.replace("fma", ""), [BASELINE]),
        ("", [BASELINE]),
    ],
    ids=["sapphire rapids", "zen 4", "cascade lake", "skylake-x", "knights landing", "haswell", "no fma", "unknown"],
)
def test_a_processor_has_the_levels_whose_features_it_has_best_first(processor, features, levels):
    processor(features)
    assert machine.supported_levels() == levels


def test_amx_counts_only_where_linux_grants_it(processor, monkeypatch):
    processor(SAPPHIRE_RAPIDS)
    monkeypatch.setattr(machine, "may_use_amx", lambda: False)
    assert machine.supported_levels() == [AVX512_BF16, AVX512, AVX2, BASELINE]


def test_other_architectures_have_the_baseline_alone(processor):
    processor("fp asimd bf16 i8mm", kind="aarch64")
    assert machine.supported_levels() == [BASELINE]


def test_the_fingerprint_follows_the_processor(processor):
    seen = set()
    for features, kind in [(ZEN_4, "x86_64"), (SKYLAKE_X, "x86_64"), ("", "x86_64"), ("", "aarch64")]:
        processor(features, kind)
        seen.add(machine.fingerprint.__wrapped__())
    assert len(seen) == 4


@pytest.mark.parametrize("level", machine.LEVELS, ids=lambda level: level.name)
def test_a_levels_instructions_do_not_depend_on_the_machine_that_builds(level):
    assert not any(flag.startswith("-march") for flag in level.flags)
    assert level.lanes == {"amx_bf16": 16, "avx512_bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}[level.name]


# what the headers ask the compiler about
MACROS = ("__AVX2__", "__FMA__", "__F16C__", "__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__")
PAIRS = ("__AVX512BF16__", "__AVX512VNNI__")
AMX = ("AMX_TILE", "AMX_BF16")
DEFINED = {AMX_BF16: MACROS + PAIRS + AMX, AVX512_BF16: MACROS + PAIRS, AVX512: MACROS, AVX2: MACROS[:3], BASELINE: ()}


@pytest.mark.skipif(build.find_compiler() is None, reason="the CPU engine needs a C++ compiler")
@pytest.mark.parametrize("level", machine.supported_levels(), ids=lambda level: level.name)
def test_the_compiler_takes_a_levels_flags_for_what_they_stand_for(level):
    bits = "".join(f"#ifdef {name}\n  bits |= {1 << n};\n#endif\n" for n, name in enumerate(MACROS + PAIRS + AMX))
    export = 'extern "C" __attribute__((visibility("default")))'
    source = f"{export} int macros() {{\n  int bits = 0;\n{bits}  return bits;\n}}\n"
    bits = build.load(build.Recipe("macros", (source,), lambda: source, level)).macros()
    assert {name for n, name in enumerate(MACROS + PAIRS + AMX) if bits >> n & 1} == set(DEFINED[level])


# Linux lends nobody registers that a signal's handler could not save on the stack that it was given
REFUSED = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
from fastattn.kernels.cpu import machine
assert machine.supported_levels()[0] is machine.AVX512_BF16
from tests.kernels import test_products as products
m, n, k = products.BLOCK
for at in range(len(products.SIDES)):
    a, b, start = products.operands("bf16", m, n, k, seed=at)
    error = products.run(machine.AMX_BF16, "bf16", at, a, b, start).double() - products.exact(a, b, start)
    assert (error.abs() <= products.bound(a, b, start)).all()
assert products.order_of_sums(machine.AMX_BF16) == 0
"""


@pytest.mark.skipif(AMX_BF16 not in machine.supported_levels(), reason="this machine has no AMX, or refuses it")
def test_a_process_that_is_refused_amx_multiplies_without():
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False, cwd=root)
    assert said.returncode == 0, said.stderr
