"""What the ranks of tests/laws/test_scale_runs.py do: whole runs that are stopped, go on and fail."""

import errno
import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch

from finetune import loop
from finetune.loop import Trainer
from finetune.recipe import FinetuneRecipe
from finetune.run import Interrupted, Reporter, run_finetune
from finetune.saving import checkpoint
from finetune.scale import ranks
from jam.cli import main
from jam.errors import DataError, JamError
from jam.models import load
from tests.flows.test_training_mistakes import Spoilt
from tests.laws.scale_cases import engine


class Act(Reporter):
    """Does something on one rank after one step, and on all ranks ends a run like a kill after another one."""

    def __init__(self, step: int = 0, act=lambda: None, rank: int = 0, kill: int = 0):
        self.at, self.act, self.rank, self.kill = step, act, rank, kill
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def step(self, report) -> None:
        if report.step == self.at and torch.distributed.get_rank() == self.rank:
            self.act()
        if report.step == self.kill:
            raise KeyboardInterrupt


def recipe_of(file: Path, **changes) -> FinetuneRecipe:
    return FinetuneRecipe.model_validate(json.loads(file.read_text()) | changes)


def ended(recipe: FinetuneRecipe, reporter: Reporter | None = None) -> BaseException | None:
    """How a run ended on this rank."""
    try:
        run_finetune(recipe, reporter=reporter)
    except (JamError, KeyboardInterrupt) as error:
        return error
    return None


def travel(file: str, run: str) -> None:
    """Goes on with one process's run under DDP, is stopped by a signal to one rank, goes on under FSDP2, saves when
    asked to, and is killed."""
    recipe = recipe_of(Path(file), output_dir=run)
    with engine("ddp"):
        stopped = ended(recipe, Act(5, lambda: os.kill(os.getpid(), signal.SIGTERM), rank=1))
    assert isinstance(stopped, Interrupted) and stopped.exit_code == 143 and "step 5 of" in str(stopped)
    with engine("fsdp2"):
        asked = Act(7, lambda: (Path(run) / "SAVE").touch(), kill=8)
        killed = ended(recipe, asked)
    assert isinstance(killed, KeyboardInterrupt)
    saved = [line for line in asked.lines if line.endswith("SAVE asked; going on")]
    assert len(saved) == (os.environ["RANK"] == "0")
    assert [folder.name for folder in checkpoint.listed(Path(run))][:2] == ["checkpoint-7", "checkpoint-6"]


def repeat(file: str, folder: str) -> None:
    """The same run straight and killed twice, under each engine; over shards the first rank alone reads weights."""
    for name in ("ddp", "fsdp2"):
        if name == "fsdp2" and os.environ["RANK"] != "0":
            load.load_model = None
        with engine(name):
            assert ended(recipe_of(Path(file), output_dir=f"{folder}/{name}-straight")) is None
            broken = recipe_of(Path(file), output_dir=f"{folder}/{name}-broken")
            for kill in (4, 8):
                assert isinstance(ended(broken, Act(kill=kill)), KeyboardInterrupt)
            assert ended(broken) is None


def adapters(file: str, run: str) -> None:
    """Low-rank adapters under DDP; over shards they are refused, as is what else needs whole weights."""
    with engine("ddp"):
        assert ended(recipe_of(Path(file), output_dir=run)) is None
    raw = json.loads(Path(file).read_text())
    rows = {"groups": [{"match": "embed", "lr_mul": 1.0, "rows": [[0, 4]]}]}
    wrong = {
        "lora over FSDP2": {},
        "optim.name: muon over FSDP2": {"lora": None, "optim": raw["optim"] | {"name": "muon"}},
        "optim.groups with rows over FSDP2": {"lora": None, "optim": raw["optim"] | rows},
        "global_batch_size is 3 for 2": {"train": raw["train"] | {"global_batch_size": 3, "micro_batch_size": 1}},
    }
    for words, changes in wrong.items():
        with engine("fsdp2"):
            refused = ended(recipe_of(Path(file), output_dir=f"{run}-refused", **changes))
        assert isinstance(refused, JamError) and words in str(refused) and "\n" not in str(refused), refused


def fail(file: str, run: str) -> None:
    """What fails on one rank ends all of them, with its words."""
    rank, recipe = int(os.environ["RANK"]), recipe_of(Path(file), output_dir=run)

    def full(*unused, **also) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unusable(trainer: Trainer, step: int) -> None:
        raise DataError("data.mix.b: document 3 has 99 tokens with its images")

    kept, batch = checkpoint.ShardFile, Trainer.batch
    for failing, name in ((0, "fsdp2"), (0, "ddp")):
        checkpoint.ShardFile = full if rank == failing else kept
        with engine(name):
            found = ended(recipe)
        checkpoint.ShardFile = kept
        assert isinstance(found, JamError) and "checkpoint-3: could not be written" in str(found), found
    Trainer.batch = unusable if rank == 1 else batch
    with engine("fsdp2"):
        found = ended(recipe)
    Trainer.batch = batch
    assert isinstance(found, JamError) and "document 3 has 99 tokens" in str(found), found
    with engine("fsdp2"):
        assert isinstance(ended(recipe, Act(kill=4)), KeyboardInterrupt)
    if rank == 0:
        (checkpoint.listed(Path(run))[0] / "state.json").unlink()
    with engine("fsdp2"):
        found = ended(recipe)
    assert isinstance(found, JamError) and "none verifies" in str(found), found


def spoil(file: str, run: str) -> None:
    """A document whose loss or gradient is no number is named by all ranks, whole models or shards."""
    loop.TokenLoss = Spoilt
    for Spoilt.way, name in (("loss", "fsdp2"), ("gradient", "fsdp2"), ("gradient", "ddp")):
        with engine(name):
            found = ended(recipe_of(Path(file), output_dir=f"{run}-{Spoilt.way}-{name}"))
        assert "of data.mix.a document 3 (" in str(found) and "data.mix.a.skip: [3]" in str(found), found


def zero(file: str, run: str) -> None:
    """Goes on under ZeRO-3 with one process's run, is killed, goes on under ZeRO-3; train.ema is refused."""
    recipe = recipe_of(Path(file), output_dir=run)
    with engine("zero-3"):
        averaged = recipe_of(Path(file), output_dir=f"{run}-ema", train=recipe.train.model_dump() | {"ema": 0.9})
        assert "train.ema over ZeRO-3" in str(ended(averaged))
        assert isinstance(ended(recipe, Act(kill=7)), KeyboardInterrupt)
        assert ended(recipe) is None


def voices(file: str) -> None:
    """Errors of the command line: every rank ends in 2, one of them says why."""
    ranks._LEAVE_AFTER = timedelta(seconds=1)  # forked processes do not tell that they leave
    with engine("fsdp2"):
        assert main(["finetune", file, "model=nowhere"]) == 2


def differ(file: str, run: str) -> None:
    """One rank was given another seed and saves at other steps: they would wait for each other."""
    changes = {"seed": 5, "save": {"every": 3}} if os.environ["RANK"] == "1" else {}
    with engine("ddp"):
        found = ended(recipe_of(Path(file), output_dir=run, **changes))
    assert isinstance(found, JamError)
    assert "rank 1 was started with other settings than rank 0" in str(found) and "seed: was " in str(found)
