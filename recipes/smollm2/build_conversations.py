"""Conversations for tuning a fused SmolLM2: the mini conversations with the LLM's own prose in place of the mini's.

The LLM stays frozen, so it is best taught in its own words: what it would say by itself costs no loss, and what is left
to learn is when to draw. Stages: ask the LLM about every subject that the mini conversations explain, and about titles
without pictures (greedy, its own chat template) -> keep whole sentences, two at most -> write ``train.jsonl`` and
``validation.jsonl`` with the images beside them, in the format of any user's data, and ``drawings.jsonl``, those of the
former in which the assistant draws.

    jam fetch smollm2
    python recipes/smollm2/build_conversations.py --out runs/smollm2-data
"""

import argparse
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from finetune.data import mini_data
from jam.assets import DATA
from jam.decode.options import SamplingOptions
from jam.decode.stream import replies
from jam.document import Document, TextPart
from jam.fetch import fetch
from jam.models.load import Bundle, load_bundle

sys.path.insert(0, str(Path(__file__).parent.parent / "mini"))
from text_tools import sentences
from wordings import phrase

TITLES = 250  # plain questions that get a plain answer
TOKENS, BATCH = 64, 24
ANSWER = "Answer in two short sentences."


def ask(bundle: Bundle, questions: list[str], kept: Path) -> dict[str, str]:
    """The LLM's answers, whole sentences only; kept in a file as they come, so that a killed run goes on."""
    known = {}
    if kept.is_file():
        known = dict(json.loads(line) for line in kept.read_text().splitlines() if line.endswith("]"))
    left = [question for question in questions if question not in known]
    options = SamplingOptions(mode="text", text_temperature=0.0, max_tokens=TOKENS, max_images=0)
    with kept.open("a") as out:
        for at in range(0, len(left), BATCH):
            batch = left[at : at + BATCH]
            prompts = [Document((TextPart(f"{question} {ANSWER}", "user", 0.0),)) for question in batch]
            for question, reply in zip(batch, replies(bundle, prompts, options), strict=True):
                said = "".join(part.text for part in reply.document.parts if isinstance(part, TextPart))
                known[question] = whole(said)
                out.write(json.dumps([question, known[question]]) + "\n")
            out.flush()
            print(f"\rasked {at + len(batch)} of {len(left)}", end="", file=sys.stderr)
    return known


def whole(said: str) -> str:
    """The first two sentences that are whole, on one line.

    >>> whole("A cat is a pet. It purrs. It sle")
    'A cat is a pet. It purrs.'
    """
    kept = [sentence for sentence in sentences(" ".join(said.split())) if sentence[-1:] in ".!?"]
    return " ".join(kept[:2])


def question_about(label: str) -> str:
    return f"What is {phrase(label)}?"


@cache
def label_of() -> dict[str, str]:
    return {row["file"]: row["label"] for row in mini_data.image_rows()}


def explained(row: dict) -> list[str]:
    """The labels that a conversation explains in prose, in order."""
    if row["kind"] == "compare":
        return [label_of()[part["path"]] for part in row["messages"][-1]["content"] if part["type"] == "image"]
    return [row["subject"]] if row["kind"] in ("explain", "more") else []


def rewritten(row: dict, answers: dict[str, str]) -> list[dict] | None:
    """The messages with the LLM's prose; None where it had none to give."""
    prose = [answers.get(question_about(label), "") for label in explained(row)]
    if not all(prose):
        return None
    if not prose:
        return row["messages"]
    messages = [dict(message) for message in row["messages"]]
    if row["kind"] == "more":  # the picture first, then what it is
        messages[-1]["content"] = [{"type": "text", "text": prose[0]}]
        return messages
    images = [part for part in messages[-1]["content"] if part["type"] == "image"]
    pairs = zip(prose, images, strict=True)
    messages[-1]["content"] = [part for text, image in pairs for part in ({"type": "text", "text": text}, image)]
    return messages


def plain(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def titles() -> list[str]:
    """Titles of articles, spread over the train split, that no picture shows."""
    shown = {row["label"].lower() for row in mini_data.image_rows()}
    rows = [r["title"] for r in mini_data.read_jsonl(DATA / "wikipedia.jsonl.xz") if r["split"] == "train"]
    free = sorted((mini_data.hash_fraction("asked", title), title) for title in rows if title.lower() not in shown)
    return [title for _, title in free[:TITLES]]


def conversations(split: str, answers: dict[str, str], asked: list[str]) -> Iterator[dict]:
    labels = set()
    for row in mini_data.conversations(split):
        if (messages := rewritten(row, answers)) is not None:
            yield {"id": row["id"], "messages": messages}
        labels |= set(explained(row))
    for label in sorted(labels):  # asked without a picture: the answer has none
        if answer := answers.get(question_about(label)):
            yield {"id": f"plain-{label}", "messages": plain(question_about(label), answer)}
    for title in asked:
        if answer := answers.get(f"What is {title}?"):
            yield {"id": f"plain-{title}", "messages": plain(f"What is {title}?", answer)}


def images(row: dict, roles: tuple[str, ...]) -> list[str]:
    """The image files that these roles show."""
    contents = [message["content"] for message in row["messages"] if message["role"] in roles]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["path"] for part in parts if part["type"] == "image"]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{path}: {len(rows)} conversations", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for split in ("train", "validation") for row in mini_data.conversations(split)]
    labels = {label for row in rows for label in explained(row)}
    asked = titles()
    questions = [*map(question_about, sorted(labels)), *(f"What is {title}?" for title in asked)]
    bundle = load_bundle(fetch("smollm2"), dtype=torch.bfloat16)
    answers = ask(bundle, questions, options.out / "answers.jsonl")
    used = set()
    for split in ("train", "validation"):
        rows = list(conversations(split, answers, asked if split == "train" else []))
        used |= {path for row in rows for path in images(row, ("user", "assistant"))}
        write_jsonl(options.out / f"{split}.jsonl", rows)
        if split == "train":
            write_jsonl(options.out / "drawings.jsonl", [row for row in rows if images(row, ("assistant",))])
    with zipfile.ZipFile(DATA / "images.zip") as archive:
        for name in sorted(used):
            target = options.out / name
            target.parent.mkdir(exist_ok=True)
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


if __name__ == "__main__":
    main()
