"""Steps that are not logged yet go through JSON and back to the bit."""

import json

import torch

from finetune.loop import StepReport
from finetune.saving import tally


def test_reports_come_back_to_the_bit():
    reports = []
    for step in (1, 2):
        sums = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) / 3
        reports.append(StepReport(step, 9, 64 * step, 0.1 + 0.2, 1e-30, 2 / 3, 3e-4, 0.1, sums, [1.0, 1 / 3]))
    again = tally.from_json(json.loads(json.dumps(tally.to_json(reports))))
    for one, other in zip(again, reports, strict=True):
        assert torch.equal(one.sums, other.sums) and one.sums.dtype == torch.float64
        assert vars(one) | {"sums": 0} == vars(other) | {"sums": 0}
