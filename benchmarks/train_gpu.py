"""How much of a GPU training uses: a 1B shape, and two 0.5B towers fused by cross-attention, in bfloat16.

Random weights and ids; rows of 4,096 tokens, each three captioned images of 1,024 codes and a text, packed without a
gap. Steps are ``finetune.loop.Trainer``'s own, optimizer and clipping included. MFU counts what the model has to
compute (``finetune.watching.flops``), over the data sheet's peak; beside it stands the same over what a plain matrix
product reaches on this device in the same run.

    python -m benchmarks.train_gpu              # a CUDA device
    python -m benchmarks.train_gpu --quick      # small shapes on what is there: the script, not a figure
"""

import argparse
import gc
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config

from finetune.data.sources import Source
from finetune.loop import Trainer
from finetune.order.pack import Placed, Sequence
from finetune.order.plan import PackedSource
from finetune.recipe import FinetuneRecipe
from finetune.run import choose_attention
from finetune.scale.engines import start_processes
from finetune.watching.flops import WorkMeter, known_peak
from finetune.watching.log import peak_memory
from jam.memory import keep_freed_memory
from jam.models.cross import JamCrossForCausalLM
from jam.models.cross_config import JamCrossConfig
from jam.models.load import Bundle, quiet_transformers
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD, Tokens
from jam.tokens.vocabulary import Span, Vocabulary

IDS, CODES = 65_536, 8_192
VOCABULARY = Vocabulary(
    (Span("control", 0, 8), Span("text", 8, IDS - CODES), Span("image", IDS - CODES, IDS)),
    {"bos": 0, "pad": 1, "eos": 2, "mask": 3, "infill": 4, "begin_image": 5, "end_image": 6},
    codes_per_image=1024,
)


def one_tower(quick: bool, length: int) -> PreTrainedModel:
    """TinyLlama's layers (22 of d 2048) under 65,536 ids."""
    layers, width, inner, heads, groups = (2, 128, 352, 4, 2) if quick else (22, 2048, 5632, 32, 4)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=IDS,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=length,
        )
    )


def two_towers(quick: bool, length: int) -> PreTrainedModel:
    """Qwen2-0.5B's layers (24 of d 896) twice, an exchange every second layer."""
    layers, width, inner, heads, groups = (2, 128, 352, 4, 2) if quick else (24, 896, 4864, 14, 2)
    tower = Qwen2Config(
        vocab_size=IDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    ).to_dict()
    exchanges = [[layer, layer] for layer in range(2, layers + 1, 2)]
    return JamCrossForCausalLM(
        JamCrossConfig(
            text_config=tower,
            image_config=tower,
            exchanges=exchanges,
            vocabulary=VOCABULARY.to_json(),
            vocab_size=IDS,
        )
    )


def row(generator: np.random.Generator, length: int) -> Sequence:
    """A sequence without a gap: captioned images, of a quarter of its tokens each, and a text for what is left."""
    codes, caption = length // 4, length // 128
    image_ids = (IDS - CODES, IDS)
    captioned = [((8, IDS - CODES), caption, TEXT_HEAD), (image_ids, codes, IMAGE_HEAD)]
    plain = [((8, IDS - CODES), length - 3 * (codes + caption), TEXT_HEAD)]
    return [Placed(_document(generator, parts), 0) for parts in (captioned, captioned, captioned, plain)]


def _document(generator: np.random.Generator, parts: list[tuple[tuple[int, int], int, int]]) -> Tokens:
    ids = np.concatenate([generator.integers(*bounds, size) for bounds, size, _ in parts])
    heads = np.concatenate([np.full(size, head, np.uint8) for _, size, head in parts])
    segments = np.concatenate([np.full(size, number, np.int32) for number, (_, size, _) in enumerate(parts)])
    return Tokens(ids.astype(np.int32), heads, np.ones(len(ids), np.float32), segments)


class Rows:
    """A plan of sequences that are there already."""

    weights = (1.0,)

    def __init__(self, sequences: list[Sequence], source: PackedSource):
        self.sequences, self.sources = sequences, [source]

    def sequence(self, t: int) -> tuple[int, Sequence]:
        return 0, self.sequences[t % len(self.sequences)]


def product_rate(device: torch.device, size: int) -> float:
    """FLOP/s of the best of ten bfloat16 products of two square matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        _wait(device)
        began = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(model: PreTrainedModel, recipe: FinetuneRecipe, accelerator: Accelerator, warm: int) -> tuple[float, ...]:
    """Tokens and FLOPs a second, and bytes at the peak."""
    bundle = Bundle(Path(), model, VOCABULARY, None, None, ())
    model.set_attn_implementation(choose_attention(recipe))
    generator, length = np.random.default_rng(0), recipe.data.seq_len
    source = Source("random", 1, lambda index, draw: Tokens(*[np.zeros(0)] * 4), True, 1.0, 1.0)
    rows = Rows(
        [row(generator, length) for _ in range(recipe.train.global_batch_size)],
        PackedSource(source, 0, bundle, recipe, length),
    )
    trainer = Trainer(bundle, rows, recipe, accelerator, recipe.train.steps)
    meter, device = WorkMeter(bundle, joint=False), accelerator.device
    for _ in range(warm):
        trainer.advance()
    _wait(device)
    began, tokens, flops = time.perf_counter(), 0.0, 0.0
    for _ in range(recipe.train.steps - warm):
        report = trainer.advance()
        tokens += recipe.train.global_batch_size * length
        flops += meter.work().of(report.counts, report.sums)
    _wait(device)
    seconds = time.perf_counter() - began
    return tokens / seconds, flops / seconds, peak_memory(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro", type=int, default=8, help="sequences of a pass")
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    if not given.quick and not torch.cuda.is_available():
        parser.error("no CUDA device here: not measured; --quick runs small shapes on a CPU")
    keep_freed_memory()
    accelerator = start_processes()  # as jam finetune has it: the loop alone sets the precision
    device = accelerator.device
    steps, warm, micro, length = (3, 1, 2, 256) if given.quick else (given.steps, 5, given.micro, 4096)
    train = {"steps": steps, "micro_batch_size": micro, "global_batch_size": micro, "precision": "bf16"}
    recipe = FinetuneRecipe.model_validate(
        {
            "model": "unused",
            "output_dir": "unused",
            "data": {"seq_len": length, "mix": {"random": {"kind": "text", "path": "mini", "weight": 1}}},
            "train": train | {"checkpointing": given.checkpointing},
        }
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    sheet, product = known_peak(name, "bf16"), product_rate(device, 1024 if given.quick else 8192)
    print(f"{name}: {'peak not known' if sheet is None else f'{sheet:.0f} TFLOP/s by its data sheet'}, ", end="")
    print(f"{product / 1e12:.3g} in a plain product; {micro} x {length} tokens a step\n")
    print("| shape | parameters | tokens a second | TFLOP/s | MFU | over a plain product | memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for label, bar, make in (("one tower, 1B", " (bar 45 %)", one_tower), ("cross, 0.5B + 0.5B", "", two_towers)):
        torch.manual_seed(0)
        with quiet_transformers(), torch.device(device):
            model = make(given.quick, length)
        parameters = sum(p.numel() for p in model.parameters())
        tokens, flops, memory = measure(model, recipe, accelerator, warm)
        mfu = "-" if sheet is None else f"{flops / sheet / 1e10:.1f} %{bar}"
        print(
            f"| {label} | {parameters:,} | {tokens:,.0f} | {flops / 1e12:.3g} | {mfu} | {flops / product:.2f} "
            f"| {memory / 1e9:.1f} |",
            flush=True,
        )
        del model
        accelerator.free_memory()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
