"""A pytest plugin that keeps the journal of :mod:`perf.gpu`: each test's end as it comes, and no test twice.

``pytest -p perf.gpu_pytest --journal FILE --skip-done FILE``. The list of tests that are done is a file of its own,
which does not change while tests run: every worker of pytest-xdist has to collect the same tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.gpu_journal import Journal

STAGE = "tests"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, required=True, help="where ends of tests are appended")
    parser.addoption("--skip-done", type=Path, help="ids of tests, one a line, that are left out")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist hand their reports to the one that writes
        config.pluginmanager.register(_Writer(Journal(Path(str(config.getoption("--journal"))))))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--skip-done")
    done = set(path.read_text().splitlines()) if path is not None and path.exists() else set()
    items[:] = [item for item in items if item.nodeid not in done]


class _Writer:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.planned = False
        self.seconds = 0.0
        self.reports: dict[str, list[pytest.TestReport]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.plan([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self.plan(ids)

    def plan(self, ids: list[str]) -> None:
        if ids and not self.planned:
            self.planned = True
            self.journal.write("plan", stage=STAGE, steps=ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.end(report.nodeid or "collection", "failed", 0.0, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.journal.write("begin", stage=STAGE, step=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.setdefault(report.nodeid, []).append(report)
        if report.when not in ("setup", "call", "teardown"):  # pytest-xdist's word for a worker that died
            self.pytest_runtest_logfinish(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        reports = self.reports.pop(nodeid, [])
        worst = max(reports, key=lambda report: ("passed", "skipped", "failed").index(report.outcome), default=None)
        if worst is None:
            return
        why = ""
        if worst.failed:
            why = str(worst.longrepr)
        elif worst.skipped:
            why = worst.longrepr[2] if isinstance(worst.longrepr, tuple) else str(worst.longrepr)
        self.end(nodeid, worst.outcome, sum(report.duration for report in reports), why)

    def end(self, step: str, status: str, seconds: float, why: str) -> None:
        self.journal.write("end", stage=STAGE, step=step, status=status, seconds=round(seconds, 3), why=why[-2000:])
