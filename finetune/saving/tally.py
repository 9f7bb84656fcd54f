"""Steps that no line of the log tells of yet, kept in every checkpoint, so that a resumed run logs what an
uninterrupted one logs: means over steps on both sides of the stop.
"""

import torch

from finetune.loop import StepReport


def to_json(reports: list[StepReport]) -> list[dict]:
    """Numbers that JSON gives back to the bit."""
    return [vars(report) | {"sums": report.sums.tolist()} for report in reports]


def from_json(raw: list[dict]) -> list[StepReport]:
    return [StepReport(**entry | {"sums": torch.tensor(entry["sums"], dtype=torch.float64)}) for entry in raw]
