"""What a run has added up for its log: kept in every checkpoint, so that a resumed run logs what an uninterrupted one
logs, share of every source and means over steps on both sides of the stop included.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from finetune.loop import StepReport


@dataclass
class Tally:
    """``totals`` float64 [2 + sources, 2] are sums as of ``StepReport`` over the whole run; ``pending`` are the steps
    since the last line of the log."""

    totals: Tensor
    pending: list[StepReport] = field(default_factory=list)

    @classmethod
    def new(cls, sources: int) -> Self:
        return cls(torch.zeros(2 + sources, 2, dtype=torch.float64))

    def add(self, report: StepReport) -> None:
        self.totals += report.sums
        self.pending.append(report)

    def to_json(self) -> dict:
        """Numbers that JSON gives back to the bit; tensors as lists."""
        pending = [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(report).items()}
            for report in self.pending
        ]
        return {"totals": self.totals.tolist(), "pending": pending}

    @classmethod
    def from_json(cls, raw: dict) -> Self:
        def restored(value: object) -> object:
            return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value

        pending = [StepReport(**{name: restored(value) for name, value in entry.items()}) for entry in raw["pending"]]
        return cls(restored(raw["totals"]), pending)
