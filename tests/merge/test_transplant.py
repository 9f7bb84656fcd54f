"""Tokens as bytes, and bytes as another tokenizer's tokens."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from merge.transplant import Spelling, pieces
from tests.tiny import tiny_tokenizer


def sentencepiece(folder: Path, words: list[str], merges: list[tuple[str, str]]) -> Spelling:
    """A BPE of Llama 2's kind: ``▁`` for a space, bytes for what it cannot spell."""
    folder.mkdir()
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE({word: n for n, word in enumerate(vocab)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in vocab[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Spelling.of(folder)


@pytest.fixture
def spellings(tmp_path: Path) -> tuple[Spelling, Spelling]:
    (tmp_path / "bytes").mkdir()
    tiny_tokenizer().save(str(tmp_path / "bytes" / "tokenizer.json"))
    words, merges = ["▁", "t", "h", "e", "a", "he", "▁t", "▁the"], [("h", "e"), ("▁", "t"), ("▁t", "he")]
    return Spelling.of(tmp_path / "bytes"), sentencepiece(tmp_path / "pieces", words, merges)


def test_a_token_is_the_same_bytes_in_both_spellings(spellings: tuple[Spelling, Spelling]):
    ours, theirs = spellings
    assert ours.token_bytes(ours.tokenizer.token_to_id("Ġthe")) == b" the"
    assert theirs.token_bytes(theirs.tokenizer.token_to_id("▁the")) == b" the"
    assert theirs.token_bytes(theirs.tokenizer.token_to_id("<0xE2>")) == b"\xe2"
    assert ours.token_bytes(10**6) == b"" and ours.token_bytes(0) == b"<s>"


def test_a_piece_is_cut_without_a_space_put_before_it(spellings: tuple[Spelling, Spelling]):
    _, theirs = spellings
    name = theirs.tokenizer.id_to_token
    assert [name(i) for i in theirs.cut(b" the")] == ["▁the"]
    assert [name(i) for i in theirs.cut(b"the")] == ["t", "he"]
    assert [name(i) for i in theirs.cut("é".encode())] == ["<0xC3>", "<0xA9>"]
    assert [name(i) for i in theirs.cut(b"\xc3")] == ["<0xC3>"] and theirs.cut(b"") == []


def test_every_byte_has_a_word_both_ways(spellings: tuple[Spelling, Spelling]):
    ours, theirs = spellings
    for first, second in ((ours, theirs), (theirs, ours)):
        ids = [index for index in first.words if first.token_bytes(index) and first.words[index] not in first.added]
        offsets, found = pieces(first, second, ids)
        for n, index in enumerate(ids):
            cut = found[offsets[n] : offsets[n + 1]].tolist()
            assert cut and b"".join(second.token_bytes(piece) for piece in cut) == first.token_bytes(index)
