"""Which instruction sets the engine takes a processor for."""

from __future__ import annotations

import platform

import pytest

from fastattn.kernels.cpu import build, machine
from fastattn.kernels.cpu.machine import AVX2, AVX512, AVX512_BF16, BASELINE

# what Linux says of them, as far as it matters here
HASWELL = "sse2 ssse3 sse4_2 movbe popcnt f16c abm bmi1 avx2 bmi2 fma"
KNIGHTS_LANDING = f"{HASWELL} avx512f avx512cd avx512er avx512pf"
SKYLAKE_X = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl"
CASCADE_LAKE = f"{SKYLAKE_X} avx512_vnni"
ZEN_4 = f"{CASCADE_LAKE} avx512_bf16 avx512vbmi avx512_vpopcntdq"


@pytest.fixture
def processor(monkeypatch):
    def pretend(features: str, kind: str = "x86_64") -> None:
        monkeypatch.setattr(machine, "features", lambda: frozenset(features.split()))
        monkeypatch.setattr(platform, "machine", lambda: kind)

    return pretend


@pytest.mark.parametrize(
    "features, levels",
    [
        (ZEN_4, [AVX512_BF16, AVX512, AVX2, BASELINE]),
        (CASCADE_LAKE, [AVX512, AVX2, BASELINE]),
        (SKYLAKE_X, [AVX512, AVX2, BASELINE]),
        (KNIGHTS_LANDING, [AVX2, BASELINE]),
        (HASWELL, [AVX2, BASELINE]),
        (HASWELL.replace("fma", ""), [BASELINE]),
        ("", [BASELINE]),
    ],
    ids=["zen 4", "cascade lake", "skylake-x", "knights landing", "haswell", "no fma", "unknown"],
)
def test_a_processor_has_the_levels_whose_features_it_has_best_first(processor, features, levels):
    processor(features)
    assert machine.supported_levels() == levels


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
    assert level.lanes == {"avx512_bf16": 16, "avx512": 16, "avx2": 8, "baseline": 4}[level.name]


# what the headers ask the compiler about
MACROS = ("__AVX2__", "__FMA__", "__F16C__", "__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__")
PAIRS = ("__AVX512BF16__", "__AVX512VNNI__")
DEFINED = {AVX512_BF16: MACROS + PAIRS, AVX512: MACROS, AVX2: MACROS[:3], BASELINE: ()}


@pytest.mark.skipif(build.find_compiler() is None, reason="the CPU engine needs a C++ compiler")
@pytest.mark.parametrize("level", machine.supported_levels(), ids=lambda level: level.name)
def test_the_compiler_takes_a_levels_flags_for_what_they_stand_for(level):
    bits = "".join(f"#ifdef {name}\n  bits |= {1 << n};\n#endif\n" for n, name in enumerate(MACROS + PAIRS))
    export = 'extern "C" __attribute__((visibility("default")))'
    source = f"{export} int macros() {{\n  int bits = 0;\n{bits}  return bits;\n}}\n"
    bits = build.load(build.Recipe("macros", (source,), lambda: source, level)).macros()
    assert {name for n, name in enumerate(MACROS + PAIRS) if bits >> n & 1} == set(DEFINED[level])
