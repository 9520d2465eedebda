"""``check``: rounding is told from ties, and ties from another model."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.export import check, outputs
from fastattn.export.compare import CheckReport, OutputError, _own_errors


def test_the_same_draws_give_an_error_of_rounding_and_no_more_is_asked(bert, bert_file, make_tokens):
    report = check(bert, bert_file, make_tokens(3, 101, [101, 64, 1]))
    assert report.ok
    assert all(error.relative < 1e-5 and error.own is None for error in report.errors), report


def test_another_model_is_far_from_what_its_own_last_bits_do(bert, bert_file, make_tokens):
    with fastattn.patched(bert, "smyrf", seed=1, n_hashes=2, q_cluster_size=16, min_length=0, impl="reference"):
        report = check(bert, bert_file, make_tokens(2, 100, None))
    assert not report.ok
    for error in report.errors:
        assert error.own is not None and error.own < 1e-4 < 1e-2 < error.relative
    assert "torch's own, as its weights' last bit moves" in str(report)


class Sorts(torch.nn.Module):
    """Stands for a cluster's edge: which of two rows comes out is decided by the last bit of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 1.0 + 2**-23]))

    def forward(self, rows):
        return rows * 0.0 + (rows[:, :1] if self.weight[0] < self.weight[1] else rows[:, 1:2])


def test_torchs_own_error_shows_ties():
    rows = {"rows": torch.tensor([[1.0, 2.0]])}
    own = _own_errors(Sorts(), rows, outputs.run(Sorts(), rows))
    assert own["output"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("relative", "own", "ok"),
    [(1e-6, None, True), (1e-3, 1e-6, False), (6e-2, 6e-2, True), (6e-2, 1e-2, False), (1e-3, None, False)],
)
def test_an_error_is_ok_within_rounding_or_where_torch_is_as_torn(relative, own, ok):
    fine = OutputError("a", largest=1e-6, relative=1e-6, rows_off=0.0, tolerance=1e-4)
    error = OutputError("b", largest=0.1, relative=relative, rows_off=0.5, tolerance=1e-4, own=own)
    assert error.ok == ok
    assert CheckReport((fine, error)).ok == ok
