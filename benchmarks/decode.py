"""Image decoding against transformers' ``generate`` with its own guidance, on the same weights in bfloat16.

A Llama-shaped network with random weights and an untied head over 73,728 ids, of which 8,192 are codes, draws one image
from a prompt of 64 tokens. All sides are greedy and are then told the same token (teacher forcing), so that all see the
same sequence. Every figure is the time of a whole image; sides alternate, medians are shown. Between transformers and
the decoder stand two loops that take its gains one by one: both streams in one batch, then the codes' rows of the head.

Last, what it costs to show an image while it is drawn: the previews of the shipped model's, one a quarter of its rows,
against drawing it (with the model's own settings, four beams, and by chance without guidance).

    python -m benchmarks.decode            # 24 layers, d 1024, 256 codes
    python -m benchmarks.decode --quick    # 8 layers, 32 codes, one round (under a minute)
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from jam.decode import engine
from jam.decode.engine import generate, run_job
from jam.decode.grammar import Kind, Row, Rules
from jam.decode.job import Job
from jam.decode.options import SamplingOptions, default_options
from jam.document import Document, TextPart
from jam.memory import keep_freed_memory
from jam.models.load import Bundle, load_bundle, quiet_transformers
from jam.models.readout import readout
from jam.shipped import model_folder
from jam.tokens.vocabulary import Span, Vocabulary

IDS, CODES, PROMPT = 73_728, 8_192, 64
CONTROLS = {"bos": 0, "pad": 1, "eos": 2, "mask": 3, "begin_image": 4, "end_image": 4}


def network(layers: int, width: int, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=IDS,
        hidden_size=width,
        intermediate_size=2816 * width // 1024,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def bundle_of(model: LlamaForCausalLM, codes: int) -> Bundle:
    spans = (Span("control", 0, 8), Span("text", 8, IDS - CODES), Span("image", IDS - CODES, IDS))
    vocabulary = Vocabulary(spans, CONTROLS, codes_per_image=codes)
    return Bundle(Path("benchmark"), model, vocabulary, None, None, ("bos", "mask", "begin_image"))


class Forced(LogitsProcessor):
    """transformers' way to be told every token."""

    def __init__(self, tokens: torch.Tensor, prompt: int):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.tokens[input_ids.shape[1] - self.prompt]] = torch.finfo(scores.dtype).max
        return scores


class Case:
    """One image to draw: the model, a prompt and the codes that all sides are told."""

    def __init__(self, model: LlamaForCausalLM, codes: int):
        self.model, self.codes, self.bundle = model, codes, bundle_of(model, codes)
        self.device = model.device
        draw = torch.Generator().manual_seed(1)
        self.prompt = [0, *torch.randint(8, IDS - CODES, (PROMPT - 2,), generator=draw).tolist()]
        self.tokens = torch.randint(0, CODES, (codes,), generator=draw).to(self.device)

    def job(self, rows: int, scale: float) -> Job:
        options = SamplingOptions(
            mode="image", max_images=1, max_tokens=self.codes + 3, image_temperature=0.0, guidance_scale=scale
        )
        grammar = [Row(Rules(self.bundle.vocabulary, "image", 0, 1), self.codes + 3) for _ in range(rows)]
        job = Job([options] * rows, [self.prompt] * rows, grammar, list(range(rows)))
        job.prefix = [0, 3] if options.guided else None
        return job

    def ours(self, rows: int = 1, scale: float = 3.0) -> int:
        """Draws with the decoder; the number of forwards."""
        plain, told = engine.choose_codes, iter(self.tokens)

        def forced(options, scores, uniforms, used):
            return torch.zeros_like(plain(options, scores, uniforms, used)) + next(told)

        engine.choose_codes = forced
        try:
            steps = list(run_job(self.bundle, self.job(rows, scale)))
        finally:
            engine.choose_codes = plain
        codes = [step.token - IDS + CODES for step in steps if step.row == 0][1:-2]
        assert codes == self.tokens.tolist(), "not the codes that were told"
        return len(steps) // rows

    @torch.inference_mode()
    def theirs(self) -> None:
        ids = torch.tensor([[*self.prompt, 4]], device=self.device)
        forced = Forced(self.tokens + IDS - CODES, ids.shape[1])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            negative_prompt_ids=torch.tensor([[0, 3, 4]], device=self.device),
            negative_prompt_attention_mask=torch.ones(1, 3, dtype=torch.int64, device=self.device),
            guidance_scale=3.0,
            max_new_tokens=self.codes,
            min_new_tokens=self.codes,
            do_sample=False,
            logits_processor=LogitsProcessorList([forced]),
        )
        assert (out[0, ids.shape[1] :] - IDS + CODES).tolist() == self.tokens.tolist(), "not the codes that were told"

    @torch.inference_mode()
    def batched(self, sliced: bool) -> None:
        """transformers' forward and growing cache on both streams at once; the whole head, or the codes' rows."""
        width = len(self.prompt) + 1
        ids = torch.full((2, width), 1, device=self.device)
        ids[0], ids[1, -3:] = torch.tensor([*self.prompt, 4]), torch.tensor([0, 3, 4])
        mask = torch.ones(2, width, dtype=torch.int64, device=self.device)
        mask[1, :-3] = 0
        cache, parts = DynamicCache(config=self.model.config), readout(self.model, self.bundle.vocabulary)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        for code in self.tokens:
            given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
            if sliced:
                logits = parts.codes((self.model.model(ids, **given).last_hidden_state[:, -1],))
            else:
                logits = self.model(ids, logits_to_keep=1, **given).logits[:, -1, IDS - CODES :]
            full, nothing = logits.float()
            (nothing + 3.0 * (full - nothing)).argmax()
            ids = (code + IDS - CODES).expand(2, 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1


def medians(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each side, the sides taking turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def previews(rounds: int, device: torch.device) -> list[str]:
    """A line for each way of drawing with the shipped model."""
    bundle = load_bundle(model_folder(None))
    bundle.pack()
    prompt = Document((TextPart("Draw a red apple in the flat style.", "user"),))
    grid = math.isqrt(bundle.image.codes_per_image)
    every, lines, span = grid // 4, [], bundle.vocabulary.image_span
    ways = {"the model's own settings": {}, "by chance, no guidance": {"image_temperature": 1.0, "guidance_scale": 1.0}}
    for way, said in ways.items():
        own = default_options(bundle, mode="image", max_images=1, max_tokens=grid**2 + 3, **said)
        codes = [step.token - span.start for step in generate(bundle, [prompt], own) if step.kind is Kind.CODE]
        sides = {
            "draw": lambda own=own: list(generate(bundle, [prompt], own)),
            "show": lambda codes=codes: [
                bundle.image.preview(codes[: row * grid]) for row in range(every, grid, every)
            ],
        }
        took = medians(sides, max(3, rounds), device)
        lines.append(
            f"shipped model, {way}: {1000 * took['draw']:.0f} ms an image, previews every {every} of {grid} rows "
            f"{1000 * took['show']:.1f} ms, {100 * took['show'] / took['draw']:.1f} % (bar 3)"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--codes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    layers, codes, rounds = (8, 32, 1) if options.quick else (options.layers, options.codes, options.rounds)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    with quiet_transformers():
        case = Case(network(layers, options.width, options.device), codes)
    sides = {
        "transformers": case.theirs,
        "batched": lambda: case.batched(sliced=False),
        "sliced": lambda: case.batched(sliced=True),
        "ours": case.ours,
        "unguided": lambda: case.ours(scale=1.0),
        "eight": lambda: case.ours(rows=8),
    }
    names = list(sides)
    with quiet_transformers():
        case.theirs(), case.ours()  # warm up
        took = medians({name: sides[name] for name in names[:3]} | {"eager": case.ours}, rounds, case.device)
        case.bundle.pack()
        forwards = case.ours()
        took |= medians({name: sides[name] for name in names[3:]}, rounds, case.device)
    ours = took["ours"]
    print(
        f"{layers} layers, d {options.width}, head {IDS} x {options.width}, prompt {PROMPT}, {codes} codes, bfloat16, "
        f"{options.device}, {options.threads} threads, {rounds} rounds\n"
    )
    print("| | s an image | ms a code | ratio |\n|---|---|---|---|")
    rows = (
        (
            "transformers `generate`, guidance by two forwards",
            "transformers",
            f"{took['transformers'] / ours:.2f} of ours",
        ),
        ("both streams in one batch", "batched", f"gains {took['transformers'] / took['batched']:.2f}"),
        ("and the codes' rows of the head", "sliced", f"gains {took['batched'] / took['sliced']:.2f}"),
        ("jam, weights as they are", "eager", f"gains {took['sliced'] / took['eager']:.2f}"),
        (
            "jam, weights packed",
            "ours",
            f"gains {took['eager'] / ours:.2f}; in all {took['transformers'] / ours:.2f} (bar 1.9)",
        ),
        ("jam without guidance", "unguided", f"guidance costs {ours / took['unguided']:.2f} (bar 1.25)"),
        ("jam, eight candidates", "eight", f"{took['eight'] / ours:.2f} of one (bar 2.5)"),
    )
    for title, name, note in rows:
        print(f"| {title} | {took[name]:.2f} | {1000 * took[name] / codes:.1f} | {note} |")
    print(f"\nforwards: {forwards} for {codes} codes, of which {forwards - codes} are not codes")
    for line in previews(rounds, torch.device("cpu")):
        print(line)


if __name__ == "__main__":
    main()
