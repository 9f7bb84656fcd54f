"""The demo's folder and its progress: what a run is, named steps that are done once, and two bars.

``Settings`` is everything that decides what is computed. A step is done when its result file is there; files appear by
rename, so that a killed run leaves none that is not whole. The bars show the step at hand and all of the demo with the
time left: steps have weights (rough seconds), and the measured speed corrects the guess as the run goes. Off a
terminal, a line a step is printed instead.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jam import __version__, checkpoint
from jam.errors import RunError

METHODS = ("uniform", "width", "cross")
RULE = (
    "Best is the fusion with the lowest sum, over both parents, of the relative increase of the loss after training: "
    "(bits per byte - the text parent's) / the text parent's + (nats per code - the image parent's) / the image "
    "parent's, on the validation split. Below zero, it beats its parents on their own ground."
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a demo run computes; recorded in its folder."""

    text_parent: str
    image_parent: str
    weights: str = ""  # hash of the shipped weights: another version's results are not gone on with
    precision: str = "fp32"
    pretrain_tokens: int = 65_536  # each fusion
    tune_tokens: int = 65_536
    seq_len: int = 256
    batch: int = 8  # sequences of an optimizer step
    text_bytes: int = 40_000  # held-out text of a split; about 10,000 tokens
    captions: int = 96  # held-out captioned images of a split
    pictures: int = 8  # a kind of held-out caption
    questions: int = 4  # a kind of held-out question
    reply_tokens: int = 300
    train_images: int | None = None  # None is all
    seed: int = 0


def write_json(path: Path, value: object) -> None:
    """Writes a file that appears whole, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, value)


def read_json(path: Path):
    """Raises RunError for a file that does not parse, as a power cut leaves it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error}); remove the file, and the demo goes on without it") from None


class Advance(Protocol):
    """Told how far a step is: ``share`` from 0 to 1, and what it is at where that is not plain."""

    def __call__(self, share: float, note: str = "") -> None: ...


class Bars:
    """A context manager; ``step`` draws one step, ``say`` prints a line above the bars."""

    def __init__(self, console: Console, total: float):
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description:<42}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            # the mean speed over minutes: steps differ, and a guess that jumps is no guess
            TimeRemainingColumn(compact=True),
            console=console,
            speed_estimate_period=300,
            disable=not console.is_terminal,
        )
        self.overall = self.progress.add_task("demo", total=max(total, 1e-9))

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def step(self, name: str, weight: float) -> Iterator[Advance]:
        """Yields a function that is told the share of the step that is done."""
        if not self.console.is_terminal:
            self.say(f"{name} ...")
        task = self.progress.add_task(name, total=1.0)
        reached = 0.0

        def advance(share: float, note: str = "") -> None:
            nonlocal reached
            self.progress.update(task, completed=share, description=f"{name}: {note}" if note else name)
            self.progress.advance(self.overall, weight * (share - reached))
            reached = share

        try:
            yield advance
            advance(1.0)
        finally:
            self.progress.remove_task(task)


class Workbench:
    """The demo's folder: named steps with JSON results, and the seconds that each took over all calls."""

    def __init__(self, out: Path, settings: Settings, bars: Bars):
        self.out, self.settings, self.bars = out, settings, bars

    def path(self, *parts: str) -> Path:
        return self.out.joinpath(*parts)

    def result(self, name: str) -> Path:
        return self.path("results", f"{name.replace(' ', '-')}.json")

    def step(self, name: str, weight: float, make: Callable[[Advance], object]):
        """The step's result: read if it is there, else made. ``make`` gets a function to tell the share done."""
        if self.result(name).exists():
            return read_json(self.result(name))
        began = time.monotonic()
        try:
            with self.bars.step(name, weight) as advance:
                value = make(advance)
            write_json(self.result(name), value)
        finally:
            times = read_json(self.path("times.json")) if self.path("times.json").exists() else {}
            times[name] = round(times.get(name, 0.0) + time.monotonic() - began, 2)
            write_json(self.path("times.json"), times)
        return value


def open_folder(out: Path, settings: Settings) -> None:
    """Makes the folder, or checks that it is this demo's own.

    Raises:
        RunError: the folder holds something else, or a demo under other settings.
    """
    record, wanted = out / "demo.json", {"jam": __version__, "settings": asdict(settings)}
    if not record.exists():
        if out.exists() and any(out.iterdir()):
            raise RunError(
                f"{out} is not empty and holds no demo; a new or empty folder is required, choose another --out"
            )
        write_json(record, wanted)
    elif read_json(record) != wanted:
        raise RunError(f"{out} holds a demo made under other settings; choose another --out, or remove {out}")
