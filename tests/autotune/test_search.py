"""Which candidates are compiled for GPUs that are not here, and what their binaries are taken for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastattn.autotune.binaries import Binaries, Figures, Job, recipe_of
from fastattn.autotune.bounds import Tiles, gate, refusal, register_bound, shared_bound, tiles_of
from fastattn.autotune.devices import devices
from fastattn.autotune.offline import groups_of
from fastattn.autotune.rooms import room_of
from fastattn.autotune.search import Group, Report, Search, guess
from fastattn.kernels.config import Config

FORWARD = "block_attention_forward"
Answer = Callable[[Job], Figures | str]


def sound(job: Job) -> Figures:
    """A binary that takes the more registers, the larger its tiles are."""
    rows = max(job.config.blocks.values())
    return Figures(job.target, min(128, 32 + rows), 0, 64 * rows, job.config.num_warps)


def slow(job: Job) -> Figures:
    """A binary of which a multiprocessor has room for one only: every other promises more."""
    shared = min(device.shared_per_block for device in devices().values() if device.target == job.target)
    return replace(sound(job), shared_bytes=shared)


def group_of(kernel: str = FORWARD, gpus: str = "h100", plain: bool = True) -> Group:
    (group,) = groups_of([kernel], [devices()[name] for name in gpus.split(",")], ["float16"], [64], plain=plain)
    return replace(group, cases=group.cases[:1]) if plain else group


def searched(group: Group, folder: Path, answer: Answer = sound, compiles: int = 12) -> tuple[Report, list[Job]]:
    """(the report, what was compiled) with ``answer`` as the compiler; a text is the reason why there is no binary."""
    search, jobs = Search(group, Binaries(folder), compiles), []
    while (job := search.next()) is not None:
        jobs.append(job)
        figures = answer(job)
        search.tell(*((None, figures) if isinstance(figures, str) else (figures, None)), 1.0)
    return search.report(), jobs


def test_a_dozen_of_the_space_is_compiled_the_heuristics_choice_first(tmp_path: Path):
    group = group_of()
    report, jobs = searched(group, tmp_path, slow)
    candidates = group.candidates(group.cases[0])
    assert len(candidates) > 50
    assert len(jobs) == len({recipe_of(job) for job in jobs}) == report.compiled == 12
    assert jobs[0].config == candidates[0]
    (entry,) = report.entries
    assert {row.launch_config() for row in entry.rows} == {job.config for job in jobs}
    times = [row.time_us for row in entry.rows if row.time_us is not None]
    assert len(times) == 12 and times == sorted(times)
    terms = entry.rows[0].terms
    assert {"registers", "shared_bytes", "products", "memory", "tail", "blocks_per_sm", "compiled"} <= {*terms}
    assert entry.rows[0].label == "modelled"


def test_after_three_binaries_only_what_may_be_faster_is_compiled(tmp_path: Path):
    group = group_of()
    report, jobs = searched(group, tmp_path)
    assert 3 <= len(jobs) < 12
    assert report.entries[0].rows[0].verdict == "ok"
    # what turns out slower than was promised leaves the others in the running
    _, all_slow = searched(group, tmp_path / "slow", slow)
    assert len(all_slow) == 12 and {job.config for job in jobs} < {job.config for job in all_slow}


def test_all_flags_and_sizes_and_devices_share_the_dozen(tmp_path: Path):
    group = group_of(gpus="h100,h200", plain=False)
    assert len(group.cases) > 2
    report, jobs = searched(group, tmp_path)
    assert len(jobs) <= 12
    assert len({tuple(job.flags.items()) for job in jobs}) == len(group.flags_in_order())
    assert len(report.entries) == 2 * len(group.cases)
    assert all(any(row.verdict == "ok" for row in entry.rows) for entry in report.entries)
    by_device = {entry.key.device: entry.rows[0] for entry in report.entries[:2]}
    h100, h200 = by_device[devices()["h100"].title], by_device[devices()["h200"].title]
    assert float(h200.terms["memory"] or 0) < float(h100.terms["memory"] or 0)


@pytest.mark.parametrize("compiles", [1, 2, 6])
def test_fewer_compiles_are_as_many_as_were_asked_for(compiles: int, tmp_path: Path):
    group = group_of("linear_attention_scan", gpus="a100", plain=False)
    assert len(group.flags_in_order()) > 2
    report, jobs = searched(group, tmp_path, compiles=compiles)
    assert len(jobs) == compiles == group.most_compiles(compiles)
    assert len(report.entries) == min(compiles, len(group.cases))


def test_what_spills_takes_larger_tiles_with_it(tmp_path: Path):
    def answer(job: Job) -> Figures:
        is_large = job.config.blocks["BLOCK_M"] >= 64
        return replace(sound(job), spill_bytes=400 if is_large else 0, registers=255 if is_large else 100)

    report, jobs = searched(group_of(gpus="a100"), tmp_path, answer)
    spilled = [job.config for job in jobs if job.config.blocks["BLOCK_M"] >= 64]
    for config in spilled[1:]:  # it has smaller keys' tiles, more warps or fewer stages than any before
        assert not any(
            config.blocks["BLOCK_N"] >= other.blocks["BLOCK_N"] and config.num_warps <= other.num_warps
            and config.num_stages >= other.num_stages
            for other in spilled[: spilled.index(config)]
        )  # fmt: skip
    (entry,) = report.entries
    assert [row.reason for row in entry.rows if row.verdict == "failed"] == ["spills 400 bytes a thread"] * len(spilled)
    assert report.rejected == len(spilled) < 6
    assert entry.rows[0].verdict == "ok" and entry.rows[0].terms["rejected"] == len(spilled)


def test_too_much_shared_memory_is_a_verdict(tmp_path: Path):
    report, _ = searched(group_of(gpus="l4"), tmp_path, lambda job: replace(sound(job), shared_bytes=200_000), 2)
    (entry,) = report.entries
    assert {row.verdict for row in entry.rows} == {"failed"}
    assert entry.rows[0].reason == f"takes 200000 bytes of shared memory of {devices()['l4'].shared_per_block}"


def test_one_failure_of_a_cluster_ends_clusters(tmp_path: Path):
    def answer(job: Job) -> Figures | str:
        return "RuntimeError: PassManager::run failed" if job.config.num_ctas > 1 else slow(job)

    report, jobs = searched(group_of(), tmp_path, answer)
    assert sum(job.config.num_ctas > 1 for job in jobs) <= 1
    (entry,) = report.entries
    assert all("PassManager" in (row.reason or "") for row in entry.rows if row.verdict == "failed")
    assert sum(row.verdict == "ok" for row in entry.rows) >= 11


def test_kernels_that_hardly_depend_on_tiles_take_few_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastattn.autotune.search._FLAT", 1000.0)
    _, jobs = searched(group_of(), tmp_path, slow)
    assert len(jobs) == 4


def test_a_search_that_was_broken_off_compiles_nothing_twice_and_ends_alike(tmp_path: Path):
    group = group_of()
    whole, jobs = searched(group, tmp_path / "whole", slow)
    search = Search(group, Binaries(tmp_path / "parts"))
    for _ in range(5):
        job = search.next()
        assert job is not None
        search.tell(slow(job), None, 1.0)
    report, rest = searched(group, tmp_path / "parts", slow)
    assert [recipe_of(job) for job in rest] == [recipe_of(job) for job in jobs[5:]]
    assert [row.config for row in report.entries[0].rows] == [row.config for row in whole.entries[0].rows]


def test_a_line_that_was_never_finished_is_compiled_again(tmp_path: Path):
    group = group_of()
    _, jobs = searched(group, tmp_path, compiles=3)
    (file,) = (tmp_path / "cuda-90").glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-40])
    _, again = searched(group, tmp_path, compiles=3)
    assert [recipe_of(job) for job in again] == [recipe_of(jobs[-1])]
    assert searched(group, tmp_path, compiles=3)[1] == []


def test_a_recipe_is_that_of_the_binary_not_of_the_call():
    group = group_of(plain=False)
    small, large = group.cases[0], group.cases[1]
    config = group.candidates(small)[0]
    assert small.sizes != large.sizes and small.flags == large.flags
    recipe = recipe_of(group.job(small, config))
    assert recipe == recipe_of(group.job(large, config))
    assert recipe != recipe_of(group.job(group.cases[-1], config))  # other flags
    assert recipe != recipe_of(group.job(small, replace(config, num_stages=1)))
    assert recipe != recipe_of(replace(group.job(small, config), dtype="bfloat16"))
    assert recipe != recipe_of(replace(group.job(small, config), target="cuda:80"))


@pytest.mark.parametrize(
    ("gpu", "config", "reason"),
    [
        ("a100", Config(num_ctas=2), "sm_80 has no thread-block clusters, which came with sm_90"),
        ("mi300x", Config(num_ctas=2), "gfx942 has no thread-block clusters"),
        ("mi300x", Config(num_warps=32), "32 warps are 2048 threads, more than 1024"),
        ("h100", Config(num_warps=32, num_ctas=2), None),
    ],
)
def test_gates_of_an_architecture(gpu: str, config: Config, reason: str | None):
    said = gate(devices()[gpu], config)
    assert (said is None) == (reason is None) and (reason or "") in (said or "")


def test_bounds_refuse_what_is_surely_too_much():
    tiles = Tiles(staged=64 * 1024, carried=128 * 256 * 4, summed=128 * 256 * 4, products=((128, 256),))
    ada, hopper, blackwell = (devices()[name] for name in ("l4", "h100", "b200"))
    assert "shared memory of 101376" in (refusal(ada, Config(num_warps=8, num_stages=3), tiles) or "")
    assert refusal(hopper, Config(num_warps=8, num_stages=3), tiles) is None
    assert "256 registers of 255" in (refusal(hopper, Config(num_warps=4, num_stages=2), tiles) or "")
    # whose sums are kept in a memory of the tensor cores
    assert refusal(blackwell, Config(num_warps=4, num_stages=2), tiles) is None
    small = Tiles(products=((16, 32),))
    assert "2 matrix instructions for 4 wavefronts" in (refusal(devices()["mi300x"], Config(num_warps=4), small) or "")
    assert refusal(devices()["mi300x"], Config(num_warps=2), small) is None


def test_tiles_are_read_from_the_ir():
    group = group_of()
    config = Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_stages=3)
    tiles = tiles_of(group.job(group.cases[0], config).launch())
    assert tiles.staged == 2 * 64 * 64 * 2  # a tile of keys and one of values, of fp16
    assert tiles.carried == (32 * 64 + 2 * 32) * 4  # out, and each row's maximum and sum
    assert tiles.products == ((32, 64),)
    assert (tiles.work, tiles.exact) == (32 * 64 * 64, 0)
    exact = tiles_of(replace(group.job(group.cases[0], config), dtype="float32").launch())
    assert exact.work == exact.exact == tiles.work
    assert shared_bound(devices()["h100"], config, tiles) == 2 * tiles.staged
    assert register_bound(devices()["h100"], config, tiles) == tiles.carried // (4 * 128)


def test_large_products_without_tensor_cores_are_guessed_to_spill():
    half = Tiles(products=((64, 64),), work=64**3)
    exact = replace(half, exact=64**3)
    spills = {(name, tiles.exact > 0): guess(devices()[name], Config(), tiles).spill_bytes
              for name in ("t4", "h100", "mi300x") for tiles in (half, exact)}  # fmt: skip
    assert {case for case, count in spills.items() if count} == {("t4", False), ("t4", True), ("h100", True)}


def test_rows_that_several_groups_would_write_are_written_once():
    h100 = [devices()["h100"]]
    groups = groups_of(["hamming_hash", "hamming_assign"], h100, ["float16", "float32"], [64, 128])
    assert sum(group.kernel == "hamming_hash" for group in groups) == 4
    assert sum(group.kernel == "hamming_assign" for group in groups) == 1  # it sees codes, whatever they are of
    keys = [group.key(case, h100[0]).identity() for group in groups for case in group.cases]
    assert len(keys) == len(set(keys))


def test_every_kernel_has_groups_whose_work_can_be_modelled(tmp_path: Path):
    for group in groups_of(sorted({"linear_attention_scan", "hash_argmax_digit", "topk_attention_sum"}),
                           [devices()["a100"]], ["float16"], [64], plain=True):  # fmt: skip
        report, _ = searched(group, tmp_path, compiles=1)
        assert report.entries[0].rows[0].verdict == "ok", group
        assert room_of(group.kernel).representative(64)[0] == group.cases[0].sizes
