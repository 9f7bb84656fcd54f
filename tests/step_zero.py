"""The step-0 theorem of the cross merge (docs/decisions.md), checked on folders that the merge wrote, for any pair.

With zero gates, float64, to 1e-9 (1e-6 where transformers rounds to float32 inside):

    (a) on text, the distribution over the LLM's own ids is the LLM's;
    (b) on image and control ids, the image head's distribution is the image parent's, ids renumbered;
    (c) on a caption and an image, it is that of the image tower run alone, by transformers, on the joint ids.

Run as a script, it fuses every text family with every image family. The pairs differ in width, depth and heads; their
tokenizers are byte-level or sentencepiece's, their heads tied or not. Each is saved, reloaded and checked for (a), (b)
and (c); it draws an image and answers with text and an image, token by token as the loop without a cache. It prints a
table:

    python -m tests.step_zero
"""

import argparse
import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from jam.decode.engine import generate
from jam.decode.grammar import Kind
from jam.decode.naive import generate_naive
from jam.decode.options import SamplingOptions
from jam.decode.stream import ReplyStream
from jam.document import CodesPart, Document, TextPart
from jam.models.heads import next_heads, restrict
from jam.models.load import Bundle, load_bundle, quiet_transformers
from jam.tokens.render import IMAGE_HEAD, render
from merge.recipe import MergeRecipe
from merge.run import run_merge
from merge.union import owned
from tests.tiny import CODES_PER_IMAGE, tiny_document, tiny_pair

TEXT = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma"),
    *("gemma2", "gemma3_text", "smollm3", "phi3", "olmo2"),
)
IMAGE = (
    "opt",
    "chameleon",
    "llama",
    "gemma",
    "qwen2",
    "emu3_text_model",
)  # CM3Leon, Anole, LVM, Liquid, SimpleAR, Emu3
SENTENCEPIECE = ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi3")  # the kind their lineages have
SIDES = ("text", "image")
SENTENCE = "the cat and the other one on it"


@dataclass(frozen=True)
class Distances:
    """Greatest differences of log probabilities, and the spread of the scores, which must not be nothing."""

    text: float
    codes: float
    caption: float
    spread: float


def numbers(fused: Bundle, painter: Bundle) -> dict[int, int]:
    """Joint ids of the image parent's controls and codes."""
    theirs, joint = painter.vocabulary, fused.vocabulary
    found = {index: joint.controls[name] for name, index in theirs.controls.items()}
    start, at = theirs.image_span.start, joint.image_span.start
    return found | {start + code: at + code for code in range(theirs.codebook_size)}


@torch.inference_mode()
def distances(fused: Bundle, llm: Bundle, painter: Bundle) -> Distances:
    """How far a fused model with zero gates is from its parents."""
    controls = llm.vocabulary.controls
    words = [controls["bos"], *llm.text.encode(SENTENCE), controls["eos"], *llm.text.encode("a red cat")]
    ids = torch.tensor([words])
    known = torch.from_numpy(owned(llm.vocabulary, llm.vocabulary.size))
    own = llm.model(ids).logits[..., known].log_softmax(-1)
    joint = fused.logits(ids, next_heads(ids, fused.vocabulary))[0]
    kept = joint[..., : llm.vocabulary.size][..., known].log_softmax(-1)

    number, theirs = numbers(fused, painter), painter.vocabulary
    name, start = theirs.controls, theirs.image_span.start
    codes = [start + code for code in (3, 0, 15, 7)]
    bare = [
        name["bos"],
        name["mask"],
        name["begin_image"],
        *codes,
        name["end_image"],
        name["begin_image"],
        *codes[::-1],
    ]
    ids, shown = torch.tensor([bare]), torch.tensor([[number[index] for index in bare]])
    heads = next_heads(ids, theirs)
    assert (next_heads(shown, fused.vocabulary) == heads).all() and (heads == IMAGE_HEAD).sum() >= 9
    drawn = fused.logits(shown, heads)[0][heads == IMAGE_HEAD][:, list(number.values())].log_softmax(-1)
    wanted = painter.logits(ids, heads)[0][heads == IMAGE_HEAD][:, list(number)].log_softmax(-1)

    tokens = render(tiny_document(0, 2), fused.vocabulary, fused.text)
    ids = torch.from_numpy(tokens.ids).long()[None]
    heads = next_heads(ids, fused.vocabulary)
    alone = fused.model.image(ids, use_cache=False).logits
    alone = restrict(alone, heads, fused._allowed_2V)[heads == IMAGE_HEAD].log_softmax(-1)
    joint = fused.logits(ids, heads)[0][heads == IMAGE_HEAD].log_softmax(-1)
    return Distances(
        float((own - kept).abs().max()),
        float((drawn - wanted).abs().max()),
        float((alone - joint).abs().max()),
        float(min(own.std(), wanted.std())),
    )


def draws(fused: Bundle) -> int:
    """Codes of the image that a fused model draws for a caption."""
    prompt = [Document((TextPart("a red cat"),))]
    options = SamplingOptions(mode="image", max_images=1, max_tokens=CODES_PER_IMAGE + 3, seed=0)
    stream = ReplyStream(fused, prompt)
    for step in generate(fused, prompt, options):
        stream.push(step)
    return sum(len(part.codes) for part in stream.reply(0).document.parts if isinstance(part, CodesPart))


def answers(fused: Bundle) -> tuple[int, int]:
    """Text tokens and codes of a reply with one image, which the loop without a cache gives too, token by token."""
    prompt = [Document((TextPart("a red cat"),))]
    options = SamplingOptions(min_images=1, max_images=1, max_tokens=24, seed=3, text_temperature=1.0, text_top_p=1.0)
    steps = list(generate(fused, prompt, options))
    assert [step.token for step in steps] == [step.token for step in generate_naive(fused, prompt, options)]
    return tuple(sum(step.kind is kind for step in steps) for kind in (Kind.TEXT, Kind.CODE))


def fuse(tmp: Path, **changes) -> tuple[Bundle, Bundle, Bundle]:
    """A merged pair of tiny parents, reloaded: fused, text parent, image parent."""
    text, image = tiny_pair(tmp, **changes)
    run_merge(MergeRecipe(method="cross", text=text, image=image, out=tmp / "fused", dtype="float32"))
    return tuple(load_bundle(folder, torch.float64) for folder in (tmp / "fused", text, image))


def unequal(text: str, image: str) -> dict:
    """Parents that differ in width, depth, heads, tokenizer and in whether the head is the table.

    Which is the deeper one and whose head is tied change from pair to pair; the tokenizer's kind is the family's.
    """
    row, column = TEXT.index(text), IMAGE.index(image)
    layers = ((5, 3), (3, 6), (4, 7), (6, 4))[(row + column) % 4]
    own = {
        "family": (text, image),
        "hidden_size": (32, 48),
        "num_attention_heads": (4, 6),
        "num_key_value_heads": (2, 3),
        "num_hidden_layers": layers,
        "tie_word_embeddings": ((row + column) % 2 == 0, (row // 2 + column) % 2 == 0),
        "merges": (24, 12),
        "sentencepiece": (text in SENTENCEPIECE, image in SENTENCEPIECE),
    }
    return {f"{side}_{key}": values[n] for key, values in own.items() for n, side in enumerate(SIDES)}


def shown(changes: dict) -> str:
    """A pair's differences as cells of the table."""
    words = {
        "width": [str(changes[f"{side}_hidden_size"]) for side in SIDES],
        "layers": [str(changes[f"{side}_num_hidden_layers"]) for side in SIDES],
        "tokenizer": ["pieces" if changes[f"{side}_sentencepiece"] else "bytes" for side in SIDES],
        "head": ["tied" if changes[f"{side}_tie_word_embeddings"] else "own" for side in SIDES],
    }
    return " | ".join(", ".join(values) for values in words.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", choices=TEXT, default=list(TEXT))
    parser.add_argument("--image", nargs="+", choices=IMAGE, default=list(IMAGE))
    options = parser.parse_args()
    print("| text | image | width | layers | tokenizer | head | (a) text | (b) codes | (c) caption | drawn | answer |")
    print(f"|{'---|' * 11}")
    worst = 0.0
    for text in options.text:
        for image in options.image:
            changes = unequal(text, image)
            with tempfile.TemporaryDirectory() as tmp, quiet_transformers():
                with contextlib.redirect_stderr(io.StringIO()):
                    fused, llm, painter = fuse(Path(tmp), **changes)
                found, codes, answer = distances(fused, llm, painter), draws(fused), answers(fused)
            worst = max(worst, found.text, found.codes, found.caption)
            assert found.spread > 0.1 and codes == answer[1] == CODES_PER_IMAGE and answer[0] > 0
            row = f"{found.text:.1e} | {found.codes:.1e} | {found.caption:.1e} | {codes} codes"
            row += f" | {answer[0]} tokens, {answer[1]} codes"
            print(f"| {text} | {image} | {shown(changes)} | {row} |", flush=True)
    pairs = len(options.text) * len(options.image)
    print(f"\n{pairs} pairs; the greatest difference of a log probability is {worst:.1e}")


if __name__ == "__main__":
    main()
