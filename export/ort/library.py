"""Builds ``libfastattn_ort``: kernels and host code, each an object in the user's cache, linked into one library."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from fastattn.export.ort import cubins
from fastattn.export.ort.variants import Variant
from fastattn.kernels.cpu import build, engine, machine
from fastattn.kernels.cpu.emit import ENTRY, prelude

_HERE = Path(__file__).parent
_ENGINE = Path(build.__file__).parent  # whose headers the routines stand on
_OF_A_LEVEL = ("routines.cc",)  # compiled for each level, as the kernels are


def library_recipe(
    variants: Sequence[Variant], levels: Sequence[machine.Level], cuda: Mapping[str, Sequence[Variant]] = {},
    on_built: Callable[[str], object] | None = None, host_flags: Sequence[str] = (),
) -> build.Recipe:  # fmt: skip
    """The library with ``variants`` for each of ``levels``, and with ``cuda``'s for GPUs; builds what it is linked
    from, where that is not there. host_flags: more of the compiler's flags, for all but kernels.

    Raises:
        Unsupported: a kernel is not what the CPU engine can build, or there is no compiler.
    """
    kernels = {level: [_kernel(variant, level) for variant in variants] for level in levels}
    host = [_host(file, machine.BASELINE, host_flags) for file in _sources() if file.name not in _OF_A_LEVEL]
    # the linker keeps the first of what several objects have, such as the standard library's templates: the narrowest
    # instructions come first, for every level to run
    of_levels = [
        recipe
        for level in reversed(levels)
        for recipe in (*(_host(_HERE / name, level, host_flags) for name in _OF_A_LEVEL), *kernels[level])
    ]
    objects = [*_made([*host, *of_levels], on_built), *cubins.objects(cuda, on_built=on_built)]
    tables = _tables(variants, kernels) + cubins.tables(cuda)
    exports = f"-Wl,--version-script={_HERE / 'exports.map'}"
    flags = (f"-I{_HERE}", *host_flags, *(str(path.absolute()) for path in objects), exports, "-ldl")
    contents = [path.with_suffix(".sha256").read_text() for path in objects]
    return build.Recipe("libfastattn_ort", (tables, *contents), lambda: tables, machine.BASELINE, flags=flags)


def build_library(
    variants: Iterable[Variant],
    levels: Sequence[machine.Level] | None = None,
    cuda: Mapping[str, Sequence[Variant]] = {},
    on_built: Callable[[str], object] | None = None,
) -> Path:
    """The library's path in the cache; what is missing is built.

    levels: None is this machine's best. cuda: variants for GPUs by target, ``"cuda:90"``; with any, the library has
    only those ops that GPUs have, for them and the CPU. on_built: is told of each object that had to be compiled.
    """
    levels = levels or machine.supported_levels()[:1]
    unique = {repr(variant.table("")): variant for variant in variants}
    return build.made(library_recipe([*unique.values()], levels, cuda, on_built))


def _sources() -> list[Path]:
    return sorted([*_HERE.glob("*.cc"), _ENGINE / "sort.cc"])


def _host(file: Path, level: machine.Level, more: Sequence[str]) -> build.Recipe:
    headers = [header.read_text() for header in sorted([*_HERE.glob("*.h"), _ENGINE / "sort.h"])]
    text = file.read_text()
    flags = ["-c", f"-I{_HERE}", f"-I{_ENGINE}", *more]
    if file.name in _OF_A_LEVEL:
        headers.append(prelude())
        flags += [f"-DFASTATTN_LEVEL={_routines(level)}", f"-DFASTATTN_LANES={level.lanes}"]
    return build.Recipe(f"ort-{file.stem}", (text, *headers), lambda: text, level, flags=tuple(flags), suffix=".o")


def _kernel(variant: Variant, level: machine.Level) -> build.Recipe:
    recipe = engine.recipe(variant.launch, level)

    def source() -> str:
        # each kernel has the same entry point, and an object file of its own
        return recipe.source().replace(f"{ENTRY}(", f"{_entry(recipe)}(")

    return replace(recipe, key=(*recipe.key, "linked"), source=source, flags=("-c",), suffix=".o")


def _entry(recipe: build.Recipe) -> str:
    return f"{ENTRY}_{hashlib.sha256(recipe.file_name().encode()).hexdigest()[:24]}"


def _routines(level: machine.Level) -> str:
    return f"routines_{level.name}"


def _made(recipes: Sequence[build.Recipe], on_built: Callable[[str], object] | None) -> list[Path]:
    """Where the objects are, several of them built at a time."""

    def made(recipe: build.Recipe) -> Path:
        is_new = on_built is not None and not build.is_built(recipe)
        path = build.made(recipe)
        if is_new and on_built is not None:
            on_built(f"{recipe.name}, {recipe.level.name}")
        return path

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [*pool.map(made, recipes)]


def _tables(variants: Sequence[Variant], kernels: dict[machine.Level, list[build.Recipe]]) -> str:
    """The source of ``kLevels``, which holds all that was compiled."""
    tables = [variant.table(f"v{at}") for at, variant in enumerate(variants)]
    text = ['#include "cpu.h"', "namespace fastattn {", *(arrays for arrays, _ in tables)]
    levels = []
    for level in kernels:
        entries = [_entry(engine.recipe(variant.launch, level)) for variant in variants]
        text += [f'extern "C" void {entry}(const int64_t*, const int32_t*, int64_t, int64_t);' for entry in entries]
        table = ", ".join(f"{{{row}, {entry}}}" for (_, row), entry in zip(tables, entries, strict=True))
        needs = ", ".join(f'"{need}"' for need in sorted(level.needs))
        text += [
            f"const CpuVariant {level.name}_variants[] = {{{table or '{}'}}};",
            f"const char* const {level.name}_needs[] = {{{needs}{', ' if needs else ''}nullptr}};",
            f"extern const Routines {_routines(level)};",
        ]
        levels.append(
            f'{{"{level.name}", {level.name}_needs, {level.name}_variants, {len(variants)}, &{_routines(level)}}}'
        )
    text += [
        f"const Level kLevels[] = {{{', '.join(levels)}}};",
        f"const size_t kLevelCount = {len(levels)};",
        "}  // namespace fastattn\n",
    ]
    return "\n".join(text)
