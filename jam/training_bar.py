"""What ``jam finetune`` shows while it runs: a bar with the time left on a terminal, else a line now and then.

Draws what `finetune.run.Reporter` is told and computes nothing else: the full figures, by modality and source, are in
the run's ``log.jsonl``. Ranks other than the first are silent.
"""

import os

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finetune.loop import StepReport
from finetune.run import Reporter

SMOOTHING = 0.9
"""Weight of the past in the shown losses and speed: about ten steps are averaged."""


class TrainingBar(Reporter):
    """A context manager that draws the preparation stages and then the steps of one run.

    Args:
        every: steps between two lines where there is no terminal.
        console: where to draw; default the standard error output.
    """

    def __init__(self, every: int, console: Console | None = None):
        self.every = every
        self.console = console or Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
        self.progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            speed_estimate_period=120,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.figures: dict[str, float] = {}
        self.weights: dict[str, float] = {}  # that the values so far have in a figure, below 1 at first
        self.tokens: int | None = None

    def __enter__(self) -> "TrainingBar":
        self.progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.progress.stop()

    def stage(self, what: str, done: int, total: int) -> None:
        """Draw a preparation stage; off a terminal only its beginning is said."""
        if what not in self.tasks and not self.console.is_terminal:
            self.line(f"{what} ...")
        self._draw(what, done, total, "")

    def step(self, report: StepReport) -> None:
        """Draw one optimizer step, with smoothed losses by modality (nats per token), tokens a second and known MFU."""
        for row, modality in enumerate(("text", "image")):
            nats, count = report.sums[row].tolist()
            if count:
                self._smooth(modality, nats / count)
        if self.tokens is not None and report.seconds > 0:  # the first step of a run tells no difference
            self._smooth("tokens/s", (report.tokens - self.tokens) / report.seconds)
        self.tokens = report.tokens
        if report.mfu is not None:
            self._smooth("mfu", report.mfu)
        shown = {"text": ".3f", "image": ".3f", "tokens/s": ".0f", "mfu": ".1%"}
        parts = [f"{name} {self.figures[name]:{form}}" for name, form in shown.items() if name in self.figures]
        figures = "  ".join(parts)
        self._draw("training", report.step, report.steps, figures)
        if not self.console.is_terminal and (report.step % self.every == 0 or report.step == report.steps):
            self.line(f"step {report.step}/{report.steps}  {figures}  lr {report.lr:.2e}  norm {report.grad_norm:.2f}")

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _draw(self, name: str, done: int, total: int, figures: str) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, figures="")
            self.progress.reset(self.tasks[name], completed=done)  # a resumed run's speed counts from here
        self.progress.update(self.tasks[name], completed=done, total=total, figures=figures)

    def _smooth(self, name: str, value: float) -> None:
        past, weight = self.figures.get(name, 0.0), SMOOTHING * self.weights.get(name, 0.0)
        self.weights[name] = weight + 1.0 - SMOOTHING
        self.figures[name] = past + (value - past) * (1.0 - SMOOTHING) / self.weights[name]
