"""Useful tokens a second of training: jam's packed sequences against ``transformers.Trainer``, on the same documents.

A Llama shape with random weights learns the shipped mini mix (text, captioned images, conversations by token share) at
1,024 positions, in the same arithmetic, with AdamW and as many useful tokens a step, which are those of documents.
Trainer pads each batch to its longest document, in random batches or with ``group_by_length``; text cut into documents
of one length nobody pads. The sides take turns, the first step of a turn is left out, a side's figure is its fastest
turn. Then head and loss alone: peak memory for 65,536 ids (``benchmarks/head_loss.py`` has more rows).

    python -m benchmarks.train            # some minutes
    python -m benchmarks.train --quick    # few steps of a smaller shape (under a minute)
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as TheirTrainer

from benchmarks import head_loss
from finetune.data.sources import open_source
from finetune.loop import Trainer
from finetune.order.pack import Placed, Sequence
from finetune.order.plan import PackedSource, Plan
from finetune.recipe import FinetuneRecipe
from finetune.run import choose_attention
from jam.memory import keep_freed_memory
from jam.models.load import Bundle, load_bundle, quiet_transformers
from jam.shipped import model_folder
from jam.tokens.render import TEXT_HEAD, Tokens

LENGTH = 1024
MIX = {"text": ("text", 0.4), "pairs": ("captions", 0.4), "chat": ("conversations", 0.2)}


class Given:
    """A plan of sequences that are there already."""

    def __init__(self, sequences: list[Sequence], sources: list[PackedSource]):
        self.sequences, self.sources = sequences, sources

    def sequence(self, t: int) -> tuple[int, Sequence]:
        return 0, self.sequences[t % len(self.sequences)]


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds, self.began = [], 0.0

    def on_step_begin(self, *given, **more) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *given, **more) -> None:
        self.seconds.append(time.perf_counter() - self.began)


@dataclass
class Contest:
    """One shape, one recipe, some steps; each side starts from the same weights."""

    mini: Bundle
    recipe: FinetuneRecipe
    sources: list[PackedSource]
    layers: int
    width: int
    steps: int

    def network(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.mini.vocabulary.size,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            max_position_embeddings=LENGTH,
        )
        return LlamaForCausalLM(config)

    def ours(self, sequences: list[Sequence]) -> float:
        """Useful tokens a second."""
        mini = self.mini
        bundle = Bundle(mini.path, self.network(), mini.vocabulary, mini.text, None, mini.unconditional)
        bundle.model.set_attn_implementation(choose_attention(self.recipe))
        precision = "bf16" if self.recipe.train.precision == "bf16" else "no"
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        trainer = Trainer(bundle, Given(sequences, self.sources), self.recipe, accelerator, self.steps)
        seconds = [trainer.advance().seconds for _ in range(self.steps)]
        size = self.recipe.train.global_batch_size
        useful = [sum(len(one.tokens) for one in sequences[t % len(sequences)]) for t in range(size * self.steps)]
        return sum(useful[size:]) / sum(seconds[1:])

    def theirs(self, documents: list[list[int]], batch: int, sampling: str) -> float:
        """Useful tokens a second of ``batch`` documents a step."""
        useful: list[int] = []

        def collate(rows: list[dict]) -> dict[str, Tensor]:
            longest = max(len(row["input_ids"]) for row in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
                mask[place, : len(row["input_ids"])] = 1
            useful.append(int(mask.sum()))
            return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

        folder, clock = tempfile.mkdtemp(), Clock()
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch,
            max_steps=self.steps,
            bf16=self.recipe.train.precision == "bf16",
            use_cpu=True,
            train_sampling_strategy=sampling,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            log_level="error",
            remove_unused_columns=False,
            learning_rate=self.recipe.optim.lr,
        )
        rows = [{"input_ids": ids} for ids in documents]
        with quiet_transformers():
            trainer = TheirTrainer(self.network(), arguments, collate, train_dataset=rows, callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        shutil.rmtree(folder)
        done = len(clock.seconds)  # batches of one length differ in size from step to step: all of them count
        return sum(useful[1:done]) / sum(clock.seconds[1:])


def of_one_length(sequences: list[Sequence]) -> list[Tokens]:
    """The text of the mix end to end, cut into documents of ``LENGTH`` tokens."""
    texts = [one.tokens.ids for sequence in sequences for one in sequence if (one.tokens.heads == TEXT_HEAD).all()]
    ids = np.concatenate(texts)
    count = len(ids) // LENGTH
    plain = np.zeros(LENGTH, np.uint8), np.ones(LENGTH, np.float32), np.zeros(LENGTH, np.int32)
    return [Tokens(part, *plain) for part in ids[: count * LENGTH].reshape(count, LENGTH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    given = parser.parse_args()
    layers, width, size, steps, rounds = (2, 128, 2, 6, 1) if given.quick else (4, 384, 4, given.steps, given.rounds)
    keep_freed_memory()
    folder = model_folder(None)
    raw = {
        "model": str(folder),
        "output_dir": "unused",
        "data": {
            "seq_len": LENGTH,
            "mix": {name: {"kind": kind, "path": "mini", "weight": share} for name, (kind, share) in MIX.items()},
        },
        "objective": {"condition_drop": 0.0},
        "train": {
            "steps": 100,
            "micro_batch_size": size,
            "global_batch_size": size,
            "precision": given.precision,
            "random_offset": False,
        },
    }
    recipe = FinetuneRecipe.model_validate(raw)
    with quiet_transformers():
        mini = load_bundle(folder)
        opened = [open_source(name, entry, mini) for name, entry in recipe.data.mix.items()]
    plan = Plan(
        [PackedSource(source, number, mini, recipe, LENGTH) for number, source in enumerate(opened)],
        [entry.weight for entry in recipe.data.mix.values()],
        0,
    )
    began = time.perf_counter()
    packed = [plan.sequence(t)[1] for t in range(100)]
    read = sum(len(one.tokens) for sequence in packed for one in sequence)
    path = read / (time.perf_counter() - began)
    documents = [one.tokens.ids.tolist() for sequence in packed for one in sequence]
    even = of_one_length(packed)
    print(
        f"{layers} layers, d {width}, {mini.vocabulary.size} ids, {given.precision}, {torch.get_num_threads()} "
        f"threads; {len(documents)} documents of {read / len(documents):.0f} tokens on average, fill "
        f"{read / len(packed) / LENGTH:.4f} (bar 0.98)\n"
    )
    batch = max(1, round(size * LENGTH * len(documents) / read))
    contest = Contest(mini, recipe, plan.sources, layers, width, steps)
    sides = {
        "jam, packed": lambda: contest.ours(packed),
        "Trainer, random": lambda: contest.theirs(documents, batch, "random"),
        "Trainer, group_by_length": lambda: contest.theirs(documents, batch, "group_by_length"),
        "jam, one length": lambda: contest.ours([[Placed(tokens, 0)] for tokens in even]),
        "Trainer, one length": lambda: contest.theirs([tokens.ids.tolist() for tokens in even], size, "random"),
    }
    found = {name: 0.0 for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name] = max(found[name], side())
    bars = {"Trainer, random": "1.8", "Trainer, group_by_length": "1.0", "Trainer, one length": "1.0"}
    print("| | useful tokens a second | jam over it | bar |\n|---|---|---|---|")
    for name, speed in found.items():
        beside = found["jam, one length" if "one length" in name else "jam, packed"]
        print(f"| {name} | {speed:,.0f} | {beside / speed:.2f} | {bars.get(name, '')} |")
    times = path / found["jam, packed"]
    print(f"\ndata path: {path:,.0f} tokens a second, {times:.0f} times what the model takes (bar 20)")
    print("\nhead and loss in chunks (bar: under 0.25 of the plain one's peak):")
    head_loss.table(*head_loss.QUICK)


if __name__ == "__main__":
    main()
