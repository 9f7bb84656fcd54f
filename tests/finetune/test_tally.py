"""What the log has added up goes through JSON and back to the bit."""

import json

import torch

from finetune.loop import StepReport
from finetune.tally import Tally


def test_a_tally_comes_back_to_the_bit():
    tally = Tally.new(2)
    for step in (1, 2):
        sums = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) / 3
        tally.add(StepReport(step, 9, 64 * step, 0.1 + 0.2, 1e-30, 2 / 3, 3e-4, 0.1, sums))
    again = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    assert torch.equal(again.totals, tally.totals) and again.totals.dtype == torch.float64
    for one, other in zip(again.pending, tally.pending, strict=True):
        assert torch.equal(one.sums, other.sums)
        assert vars(one) | {"sums": 0} == vars(other) | {"sums": 0}
    tally.pending.clear()
    assert len(again.pending) == 2
