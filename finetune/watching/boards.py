"""Where a run's log goes besides ``log.jsonl``: TensorBoard and Weights & Biases, each through its own package.

Neither is imported unless a recipe asks. ``log.jsonl`` is the record; a board shows it. On resume TensorBoard's files
are written anew from the record, so that it holds each step once and none is lost that a killed process had not yet
flushed. W&B keeps what it was sent: its last step stands beside the run's id in ``wandb.json``, and steps up to there,
which a resumed run repeats to the same bits, are not sent again.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from finetune.recipe import LogSection
from finetune.watching.log import read_lines
from jam.errors import RunError

_EXTRAS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # by its extra, what is imported


class Board(Protocol):
    """One place that shows the log."""

    def write(self, line: dict) -> None:
        """One line; ``step`` says where, every other number is shown under its key."""

    def close(self) -> None: ...


def check_packages(log: LogSection) -> None:
    """Raises RunError where a board is asked for and its package is missing or does not load."""
    for extra in ("tensorboard",) * log.tensorboard + ("wandb",) * (log.wandb is not None):
        if extra == "wandb":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports of its own errors go out in any mode
        try:
            importlib.import_module(_EXTRAS[extra])
        except ImportError as error:
            raise RunError(
                f"log.{extra}: the package {extra} cannot be imported ({error}); it is required for that, "
                f"run pip install 'jam[{extra}]', or remove log.{extra}"
            ) from None


@contextmanager
def open_boards(
    run: Path, log: LogSection, settings: dict, tell: Callable[[str], None]
) -> Iterator[Callable[[dict], None]]:
    """Yields what shows a line on the boards that a recipe asks for, which begin with what ``log.jsonl`` holds so far.

    Args:
        settings: the whole recipe, for the board that shows it.
        tell: is given one line about where to look.
    """
    boards: list[Board] = []
    if log.tensorboard:
        boards.append(TensorBoard(run / "tensorboard"))
        tell(f"TensorBoard: tensorboard --logdir {run / 'tensorboard'}")
    if log.wandb is not None:
        boards.append(WeightsAndBiases(run, log.wandb, settings, tell))

    def write(line: dict) -> None:
        for board in boards:
            board.write(line)

    try:
        for line in read_lines(run) if boards else ():
            write(line)
        yield write
    finally:
        for board in boards:
            board.close()


def _scalars(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}


class TensorBoard:
    """Event files in a folder of their own."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=0)  # a page that is open forgets what it had read

    def write(self, line: dict) -> None:
        for name, value in _scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of W&B, offline unless the user's environment (WANDB_MODE) says otherwise."""

    def __init__(self, run: Path, project: str, settings: dict, tell: Callable[[str], None]):
        import wandb

        self.path = run / "wandb.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.id, self.sent = known.get("id") or os.urandom(4).hex(), known.get("step", -1)
        mode = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(
            project=project,
            name=run.name,
            id=self.id,
            resume="allow",
            dir=str(run),
            mode=mode,
            config=settings,
            settings=wandb.Settings(console="off", silent=True),  # the bar is ours
        )
        if mode == "offline":
            tell(f"wandb: offline in {run / 'wandb'}; to send it: wandb sync {run / 'wandb'}/offline-run-*-{self.id}")
        else:
            tell(f"wandb: WANDB_MODE is {mode}; run {self.id} of project {project}")

    def write(self, line: dict) -> None:
        if line["step"] > self.sent:
            self.run.log(_scalars(line), step=line["step"])
            self.sent = line["step"]
            temporary = self.path.with_name(".wandb.json.tmp")
            temporary.write_text(json.dumps({"id": self.id, "step": self.sent}) + "\n")
            temporary.replace(self.path)

    def close(self) -> None:
        self.run.finish()
