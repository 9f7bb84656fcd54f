"""Train the mini tokenizer: a byte-level BPE of exactly 4,096 ids on the training text of the mini set.

Stages, in order:
1. read the train split of the summaries and glosses, the captions' labels and keywords, and the question wordings;
2. train merges with Hugging Face ``tokenizers`` (control ids 0-7, then the 256 bytes, then merges by frequency);
3. write ``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

It adds no control token to any text: whoever renders a document writes those, by id. With
``tokenizer.encode_special_tokens = True`` a typed "<break>" is plain text.

    python recipes/mini/train_tokenizer.py --data jam/assets/mini/data --out jam/assets/mini/tokenizer
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from wordings import ALSO, HERE, SEEN, STYLE_NOTE, STYLES, THIS, country_name, phrase

from finetune.data.mini_data import read_jsonl

VOCABULARY = 4096
CONTROL = ("<s>", "<pad>", "</s>", "<mask>", "<infill>", "<break>", "<user>", "<assistant>")
# Words with their space, runs of digits split singly (numbers stay learnable for a small model), signs, line breaks.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTEXT = 1024


def training_text(data: Path) -> Iterator[str]:
    """Train-split prose, captions and filled-in wordings, in a fixed order."""
    for name in ("wikipedia", "glosses"):
        for row in read_jsonl(data / f"{name}.jsonl.xz"):
            if row["split"] == "train":
                yield row["text"]
    templates = [wording for wordings in SEEN.values() for wording in wordings] + [ALSO, HERE, STYLE_NOTE, THIS]
    for number, row in enumerate(row for row in read_jsonl(data / "images.jsonl") if row["split"] == "train"):
        style = row["style"]
        yield f"{row['label']}, {', '.join(row['tags'])}"
        yield f"a {style} drawing of {row['label']}"
        said, other = phrase(row["label"]), STYLES[(STYLES.index(style) + 1) % len(STYLES)]
        for offset in range(2):  # every wording about 120 times: as frequent as in the conversations
            wording = templates[(2 * number + offset) % len(templates)]
            yield wording.format(a=said, b=said, style=style, other=other, country=country_name(row["label"]))


def train(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check(tokenizer: Tokenizer) -> None:
    """Raises when the contract of ids or of the round trip is broken."""
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"{tokenizer.get_vocab_size()} ids, {VOCABULARY} required: give it more text")
    if [tokenizer.token_to_id(token) for token in CONTROL] != list(range(len(CONTROL))):
        raise RuntimeError("the control tokens did not get ids 0-7")
    tokenizer.encode_special_tokens = True
    for text in ("a <break> typed by hand", "  two  spaces\n\ttabs ", "é ツ 🍅 \x00", ""):
        if tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) != text:
            raise RuntimeError(f"{text!r} does not survive encoding and decoding")
    tokenizer.encode_special_tokens = False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the text files and images.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    args = parser.parse_args()
    tokenizer = train(training_text(args.data))
    check(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    config = roles | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": list(CONTROL[4:]),
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.out / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")
    sample = next(row["text"] for row in read_jsonl(args.data / "wikipedia.jsonl.xz") if row["split"] == "test")
    ratio = len(sample.encode()) / len(tokenizer.encode(sample).ids)
    print(f"{VOCABULARY} ids, {ratio:.2f} bytes per token on a held-out summary", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
