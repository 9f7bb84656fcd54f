"""Useful tokens a second of training: jam's packed sequences against ``transformers.Trainer``, on the same documents.

A Llama shape with random weights learns the shipped mini mix (text, captioned images, conversations by token share) at
1,024 positions, in the same arithmetic, with AdamW and as many useful tokens a step, which are those of documents.
Trainer pads each batch to its longest document, in random batches or with ``group_by_length``; of documents that have
one length nobody pads any. The first step of a side is left out.

    python -m benchmarks.train_tokens            # some minutes
    python -m benchmarks.train_tokens --quick    # few steps of a smaller shape (about a minute)
"""

import argparse
import shutil
import statistics
import tempfile
import time

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import Trainer as TheirTrainer

from finetune.loop import Trainer
from finetune.order import PackedSource, Plan
from finetune.pack import Placed, Sequence
from finetune.recipe import FinetuneRecipe
from finetune.run import choose_attention
from finetune.sources import open_source
from jam.memory import keep_freed_memory
from jam.models.load import Bundle, load_bundle, quiet_transformers
from jam.shipped import model_folder

LENGTH = 1024
MIX = {"text": ("text", 0.4), "pairs": ("captions", 0.4), "chat": ("conversations", 0.2)}


class Given:
    """A plan of sequences that are there already."""

    def __init__(self, sequences: list[Sequence], sources: list):
        self.sequences, self.sources = sequences, sources

    def sequence(self, t: int) -> tuple[int, Sequence]:
        return 0, self.sequences[t % len(self.sequences)]


def network(layers: int, width: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def ours(bundle: Bundle, recipe: FinetuneRecipe, sequences: list[Sequence], sources: list, steps: int) -> list[float]:
    """Seconds of each step."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if recipe.train.precision == "bf16" else "no")
    trainer = Trainer(bundle, Given(sequences, sources), recipe, accelerator, steps)
    return [trainer.advance().seconds for _ in range(steps)]


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds, self.began = [], 0.0

    def on_step_begin(self, *given, **more) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *given, **more) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def theirs(
    model: LlamaForCausalLM, documents: list[list[int]], batch: int, sampling: str, recipe: FinetuneRecipe, steps: int
) -> tuple[list[float], list[int]]:
    """Seconds and useful tokens of each step."""
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
        max_steps=steps,
        bf16=recipe.train.precision == "bf16",
        use_cpu=True,
        train_sampling_strategy=sampling,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        learning_rate=recipe.optim.lr,
    )
    rows = [{"input_ids": ids} for ids in documents]
    TheirTrainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[clock]).train()
    shutil.rmtree(folder)
    return clock.seconds, useful[: len(clock.seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    given = parser.parse_args()
    layers, width, sequences, steps = (2, 128, 2, 4) if given.quick else (4, 384, 4, given.steps)
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
            "micro_batch_size": sequences,
            "global_batch_size": sequences,
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
    even = [one.tokens for sequence in packed for one in sequence if len(one.tokens) == LENGTH][: sequences * steps]
    print(
        f"{layers} layers, d {width}, {mini.vocabulary.size} ids, {given.precision}; {len(documents)} documents of "
        f"{read / len(documents):.0f} tokens on average; fill {read / len(packed) / LENGTH:.4f} (bar 0.98)\n"
    )
    batch = max(1, round(sequences * LENGTH * len(documents) / read))

    def fresh() -> Bundle:
        model = network(layers, width, mini.vocabulary.size)
        bundle = Bundle(mini.path, model, mini.vocabulary, mini.text, None, mini.unconditional)
        model.set_attn_implementation(choose_attention(recipe, False))
        return bundle

    found = {}
    took = ours(fresh(), recipe, packed, opened, steps)
    found["jam, packed"] = read / len(packed) * sequences / statistics.median(took[1:])
    for sampling in ("random", "group_by_length"):
        with quiet_transformers():
            seconds, useful = theirs(fresh().model, documents, batch, sampling, recipe, steps)
        found[f"Trainer, {sampling}"] = sum(useful[1:]) / sum(seconds[1:])
    whole = [[Placed(tokens, 0)] for tokens in even]
    if len(whole) >= sequences:
        took = ours(fresh(), recipe, whole, opened, steps)
        found["jam, one length"] = sequences * LENGTH / statistics.median(took[1:])
        with quiet_transformers():
            rows = [tokens.ids.tolist() for tokens in even]
            seconds, useful = theirs(fresh().model, rows, sequences, "random", recipe, steps)
        found["Trainer, one length"] = sum(useful[1:]) / sum(seconds[1:])
    mine = found["jam, packed"]
    print("| | useful tokens a second | jam over it |\n|---|---|---|")
    for name, speed in found.items():
        beside = found["jam, one length"] if "one length" in name else mine
        print(f"| {name} | {speed:,.0f} | {beside / speed:.2f} |")
    print(f"\ndata path: {path:,.0f} tokens a second, {path / mine:.0f} times what the model takes (bar 20)")


if __name__ == "__main__":
    main()
