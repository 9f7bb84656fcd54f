"""The progress of a run: what is told off a terminal, and that a terminal gets a bar."""

import io

import torch
from rich.console import Console

from finetune.loop import StepReport
from jam.training_bar import TrainingBar


def report(step: int, image_count: float = 2.0) -> StepReport:
    sums = torch.tensor([[6.0, 3.0], [8.0, image_count]], dtype=torch.float64)
    return StepReport(step, 6, tokens=100 * step, loss=2.0, z=0.0, grad_norm=1.0, lr=1e-3, seconds=0.5, sums=sums)


def shown(terminal: bool, reports: list[StepReport]) -> str:
    stream = io.StringIO()
    with TrainingBar(2, Console(file=stream, force_terminal=terminal, width=160)) as bar:
        bar.stage("captions: codes", 0, 10)
        bar.stage("captions: codes", 10, 10)
        for item in reports:
            bar.step(item)
    return stream.getvalue()


def test_without_a_terminal_lines_at_the_logs_pace() -> None:
    lines = shown(False, [report(step) for step in range(1, 7)]).splitlines()
    assert lines[0] == "captions: codes ..."
    assert lines[1] == "step 2/6  text 2.000  image 4.000  tokens/s 200  lr 1.00e-03  norm 1.00"
    assert [line.split()[1] for line in lines[1:]] == ["2/6", "4/6", "6/6"]


def test_a_modality_without_tokens_is_not_shown_as_zero() -> None:
    assert "image" not in shown(False, [report(2, image_count=0.0)])


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    drawn = shown(True, [report(step) for step in range(1, 7)])
    assert "training" in drawn and "6/6" in drawn and "left" in drawn
    assert "step 2/6" not in drawn


def test_the_mfu_is_shown_where_it_is_known() -> None:
    known = report(2)
    known.mfu = 0.4321
    (line,) = shown(False, [known]).splitlines()[1:]
    assert "mfu 43.2%  lr" in line
    assert "mfu" not in shown(False, [report(2)])
