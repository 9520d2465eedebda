"""The report of :mod:`perf.gpu`, as Markdown and as JSON, made from its journal alone.

``report.json``::

    {"schema_version": 1,
     "machine": {name: value},          facts of the device, its driver and the libraries, as text
     "run": {"device", "quick", "minutes", "source", "started" (UTC), "seconds", "starts", "complete"},
     "stages": {name: {"status": "done" | "cut" | "failed" | "not begun", "why", "seconds", "steps", "done", "failed",
                       "cut": [steps that were not taken]}},
     "tests": {"passed", "failed", "skipped", "failures": [{"test", "why"}], "skips": {why: number}},
     "tuning": [{"kernel", "dtype", "head_dim", "sizes", "flags", "tried", "left", "refused", "first_us", "chosen",
                 "chosen_us", "label": "measured"}],
     "benchmarks": [{"what", "length", "unit", "value", "low", "high", "figure", "detail", "label": "measured"}],
     "model": [{"kernel", "dtype", "sizes", "flags", "configurations", "correlation", "chosen_us", "best_us", "ratio",
                "points": [[configuration, modelled us, measured us]]}],
     "failures": [{"stage", "step", "why"}]}

A figure that was not measured is null or is not there. Within a schema version fields are only added.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from perf.gpu_journal import Story

SCHEMA_VERSION = 1
STAGES = ("tests", "tune", "bench", "compare")
TITLES = {"tests": "Tests", "tune": "Tuning", "bench": "Benchmarks", "compare": "Modelled and measured"}
LONGEST_WHY = 300
Report = dict[str, Any]


def facts(device: torch.device) -> dict[str, str]:
    """The device, what drives it, and what the figures were made with."""
    from fastattn.autotune.device import cpu_model, describe
    from fastattn.cli.doctor import installed

    found = {"device": describe(device).name, "architecture": describe(device).arch}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["multiprocessors"] = str(properties.multi_processor_count)
        found["driver"] = driver()
        found["CUDA" if torch.version.hip is None else "ROCm"] = str(torch.version.cuda or torch.version.hip)
    found["CPU"] = f"{cpu_model()}, torch uses {torch.get_num_threads()} threads"
    found["system"] = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    found["torch"] = torch.__version__
    for package in ("triton", "flash-linear-attention", "fastattn"):
        found[package] = installed(package) or "not installed"
    return found


def driver() -> str:
    """The version of the kernel's driver."""
    for path, pattern in ((Path("/proc/driver/nvidia/version"), r"\s(\d+\.\d+(?:\.\d+)?)\s"),
                          (Path("/sys/module/amdgpu/version"), r"(\S+)")):  # fmt: skip
        found = re.search(pattern, path.read_text()) if path.exists() else None
        if found:
            return found[1]
    return "not known"


def source_state(root: Path) -> str:
    """The commit, and a hash of what differs from it; of all source files where there is no git."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("diff", "HEAD", "--", "*.py", "*.cc", "*.h"))
        )
        return commit.decode().strip() + (f" with changes {_hash([changes])}" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        folders = ("fastattn", "kernels", "autotune", "export", "tests", "perf")
        return "files " + _hash(path.read_bytes() for name in folders for path in sorted((root / name).rglob("*.py")))


def of(story: Story) -> Report:
    """The report of a journal; of one that was stopped early too."""
    start = story.start
    if start is None:
        raise ValueError("the journal has no run")
    stages = {stage: _stage(story, stage) for stage in STAGES}
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": start["facts"],
        "run": {
            "device": start["identity"]["options"]["device"],
            "quick": start["identity"]["options"]["quick"],
            "minutes": start["identity"]["minutes"],
            "source": start["identity"]["source"],
            "started": datetime.fromtimestamp(start["at"], UTC).isoformat(timespec="seconds"),
            "seconds": round(story.seconds(), 1),
            "starts": sum(line["kind"] == "run" for line in story.lines),
            "complete": all(stage["status"] == "done" for stage in stages.values()),
        },
        "stages": stages,
        "tests": _tests(story),
        "tuning": list(_tuning(story)),
        "benchmarks": list(_benchmarks(story)),
        "model": list(_model(story)),
        "failures": [
            {"stage": stage, "step": step, "why": end["why"]}
            for stage in STAGES
            for step, end in story.ends(stage).items()
            if end["status"] == "failed" and stage != "tests"
        ],
    }


def is_good(report: Report) -> bool:
    """Did nothing fail? What was cut has not failed."""
    statuses = {stage["status"] for stage in report["stages"].values()}
    return not report["failures"] and not report["tests"]["failed"] and statuses <= {"done", "cut"}


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes report.md and report.json to ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / "report.md", folder / "report.json"
    text.write_text(markdown(report))
    data.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return text, data


def markdown(report: Report) -> str:
    run, stages = report["run"], report["stages"]
    lines = [
        f"# fastattn on {report['machine']['device']}",
        "",
        f"Made by `make gpu`: {run['seconds'] / 60:.1f} of {run['minutes']:g} minutes, in {run['starts']} "
        f"start{'s' if run['starts'] > 1 else ''} from {run['started']}, of {run['source']}."
        + (" A quick run: a little of everything." if run["quick"] else ""),
        "",
        *(f"- {name}: {value}" for name, value in report["machine"].items()),
        "",
        *_table(
            ("stage", "", "seconds", "steps", "done", "failed", "cut"),
            (
                (TITLES[name], x["status"] + (f": {x['why']}" if x["why"] else ""), f"{x['seconds']:.0f}", x["steps"],
                 x["done"], x["failed"], len(x["cut"]))
                for name, x in stages.items()
            ),
        ),
    ]  # fmt: skip
    parts = {"tests": _say_tests, "tune": _say_tuning, "bench": _say_benchmarks, "compare": _say_model}
    for stage, part in parts.items():
        lines += ["", f"## {TITLES[stage]}", "", *part(report)]
        cut = stages[stage]["cut"]
        if cut:
            named = "; ".join(cut[:10]) + (f"; and {len(cut) - 10} more" if len(cut) > 10 else "")
            lines += ["", f"Not taken, for {stages[stage]['why'] or 'the run was stopped'}: {named}."]
        failed = [x for x in report["failures"] if x["stage"] == stage]
        lines += ["", *(f"- **failed**: {x['step']}: {_short(x['why'])}" for x in failed)] if failed else []
    return "\n".join([*lines, ""])


def _say_tests(report: Report) -> Iterable[str]:
    tests = report["tests"]
    yield f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."
    if tests["failures"]:
        yield ""
        yield from (f"- **failed**: `{x['test']}`: {_short(x['why'])}" for x in tests["failures"])
    if tests["skips"]:
        yield ""
        yield from (f"- skipped, {number}: {_short(why)}" for why, number in tests["skips"].items())


def _say_tuning(report: Report) -> Iterable[str]:
    yield (
        "Measured times of the kernels alone, in µs: of the heuristic's configuration, and of the fastest known. Every "
        "result was compared with the definition in float64 first."
    )
    yield ""
    yield from _table(
        ("kernel", "", "sizes", "heuristic", "chosen", "gain", "tried", "left", "configuration"),
        (
            (x["kernel"], f"{x['dtype']}, D={x['head_dim']}", _words(x["sizes"], x["flags"]), _us(x["first_us"]),
             _us(x["chosen_us"]), _ratio(x["first_us"], x["chosen_us"]), x["tried"], x["left"], _config(x["chosen"]))
            for x in report["tuning"]
        ),
    )  # fmt: skip
    for x in report["tuning"]:
        for refused in x["refused"]:
            yield f"- {x['kernel']}, {_config(refused['config'])}: {refused['verdict']}: {_short(refused['why'] or '')}"


def _say_benchmarks(report: Report) -> Iterable[str]:
    place = "fp32" if report["run"]["device"].startswith("cpu") else "fp16"
    yield (
        f"B=1, H=8, D=64, {place}; measured. Medians of one run in which the compared calls take turns, each until the "
        "device is done; in brackets where the quartiles would put the figure."
    )
    yield ""
    yield from _table(
        ("", "N", "measured", "behind it"),
        ((x["what"], x["length"], x["figure"] or "not measured", _short(x["detail"])) for x in report["benchmarks"]),
    )


def _say_model(report: Report) -> Iterable[str]:
    yield (
        "The time model's order of the configurations that were measured: Spearman's rank correlation of modelled with "
        "measured times, and the measured time of the one that the model puts first over the best."
    )
    yield ""
    yield from _table(
        ("kernel", "", "sizes", "configurations", "correlation", "model's first, µs", "best, µs", "ratio"),
        (
            (x["kernel"], x["dtype"], _words(x["sizes"], x["flags"]), x["configurations"],
             "" if x["correlation"] is None else f"{x['correlation']:.2f}", _us(x["chosen_us"]), _us(x["best_us"]),
             f"{x['ratio']:.2f}")
            for x in report["model"]
        ),
    )  # fmt: skip


def _stage(story: Story, stage: str) -> Report:
    ends, over, left = story.ends(stage), story.over(stage), story.left(stage)
    failed = sum(end["status"] == "failed" for end in ends.values())
    begun = any(line.get("stage") == stage for line in story.lines)
    if over is None:
        status = "cut" if begun else "not begun"
    elif "process ended" in over["why"]:
        status = "failed"
    else:
        status = "cut" if over["cut"] else "done"
    return {
        "status": status,
        "why": over["why"] if over is not None else "the run was stopped" if begun else "",
        "seconds": round(story.seconds(stage), 1),
        "steps": len(ends) + len(left),
        "done": len(ends) - failed,
        "failed": failed,
        "cut": left,
    }


def _tests(story: Story) -> Report:
    ends = story.ends("tests")
    counts = Counter(end["status"] for end in ends.values())
    skips = Counter(end["why"] for end in ends.values() if end["status"] == "skipped")
    failures = [{"test": name, "why": end["why"]} for name, end in ends.items() if end["status"] == "failed"]
    return {**{x: counts[x] for x in ("passed", "failed", "skipped")}, "failures": failures, "skips": dict(skips)}


def _tuning(story: Story) -> Iterable[Report]:
    for step, result in _results(story, "tune"):
        kernel, dtype, head_dim = step.split()
        for x in result["inputs"]:
            yield {"kernel": kernel, "dtype": dtype, "head_dim": int(head_dim[1:]), **x, "label": "measured"}


def _benchmarks(story: Story) -> Iterable[Report]:
    wanted = ("what", "length", "unit", "value", "low", "high", "figure", "detail")
    for _, result in _results(story, "bench"):
        for row in result["rows"]:
            yield {**{name: row[name] for name in wanted}, "label": "measured"}


def _model(story: Story) -> Iterable[Report]:
    for _, result in _results(story, "compare"):
        for x in result["entries"]:
            yield {**x, "configurations": len(x["points"]), "ratio": x["chosen_us"] / x["best_us"]}


def _results(story: Story, stage: str) -> Iterable[tuple[str, Report]]:
    ends = story.ends(stage)
    for step in story.planned(stage):
        if step in ends and ends[step]["status"] == "done":
            yield step, ends[step]["result"]


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> Iterable[str]:
    head, rows = list(head), list(rows)
    if not rows:
        return ["Nothing."]
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines]


def _words(sizes: dict[str, int], flags: dict[str, Any]) -> str:
    named = [f"{name} {size}" for name, size in sizes.items()]
    return ", ".join([*named, *(name if value is True else f"{name} {value}" for name, value in flags.items())])


def _config(config: dict[str, Any] | None) -> str:
    if config is None:
        return ""
    knobs = {name: value for name, value in config.items() if name != "blocks"}
    return ", ".join(f"{name} {value}" for name, value in {**config["blocks"], **knobs}.items())


def _us(time_us: float | None) -> str:
    return "" if time_us is None else f"{time_us:,.1f}"


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""


def _short(why: str) -> str:
    """The end of it, where an error stands, on one line."""
    line = " ".join(why.split())
    return line if len(line) <= LONGEST_WHY else "... " + line[-LONGEST_WHY:]


def _hash(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]
