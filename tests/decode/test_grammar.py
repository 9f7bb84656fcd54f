"""The grammar alone: random tokens among the legal ones always make a stream that parses."""

import itertools
import random

import pytest
import torch

from jam.decode.grammar import Kind, Phase, Row, Rules
from jam.document import CodesPart
from jam.errors import GenerationError
from jam.models.heads import next_heads
from jam.tokens.render import parse
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import Vocabulary
from tests.tiny import CODES_PER_IMAGE, tiny_tokenizer, tiny_vocabulary

VOCABULARY = tiny_vocabulary(images=True)
TEXT = TextTokenizer(tiny_tokenizer())
IMAGE = CODES_PER_IMAGE + 2  # tokens of one image


def walk(row: Row, rng: random.Random, control_share: float = 0.3) -> tuple[list[int], list[Kind]]:
    """A random path to the end; controls are taken more often than their number, or images would be rare."""
    ids, kinds = [], []
    while row.phase is not Phase.DONE:
        legal = row.legal().nonzero().flatten().tolist()
        assert legal, f"no legal id in {row}"
        controls = [token for token in legal if token < 8]
        ids.append(rng.choice(controls if controls and rng.random() < control_share else legal))
        kinds.append(row.advance(ids[-1]))
    return ids, kinds


@pytest.mark.parametrize("mode", ["interleaved", "text", "image"])
def test_every_stream_parses_and_every_state_has_a_legal_id(mode: str) -> None:
    """All rooms up to three images and more, all bounds, several walks each."""
    rng = random.Random(0)
    images, stops = 0, set()
    for least, most, slack in itertools.product((0, 1, 2), (0, 1, 3), (0, 1, IMAGE, 3 * IMAGE + 2)):
        if least > most or (mode == "text" and least) or (mode == "image" and not most):
            continue
        rules = Rules(VOCABULARY, mode, least, most)
        for _ in range(4):
            room = rules.needed_tokens + slack
            row = Row(rules, room)
            ids, kinds = walk(row, rng)
            document = parse([0, *ids], VOCABULARY, TEXT)
            drawn = [part for part in document.parts if isinstance(part, CodesPart)]
            assert rules.needed_images <= len(drawn) <= most
            assert all(len(part.codes) == CODES_PER_IMAGE for part in drawn)
            assert len(ids) <= room and (row.stop == "eos") == (ids[-1] == 2)
            assert mode != "image" or Kind.TEXT not in kinds
            assert not {0, 1, 3, 4, 6, 7} & set(ids)
            images += len(drawn)
            stops.add(row.stop)
    assert images > 10 or mode == "text"
    assert stops == ({"eos"} if mode == "image" else {"eos", "length"})


def test_the_head_of_a_state_is_the_head_of_its_ids() -> None:
    """The grammar's head must be the rule that training uses, or the decoder would read the wrong one."""
    rng = random.Random(1)
    row = Row(Rules(VOCABULARY, max_images=5), 80)
    ids, heads = [0], []
    while row.phase is not Phase.DONE:
        heads.append(row.head)
        legal = [token for token in row.legal().nonzero().flatten().tolist() if token != 2]
        ids.append(5 if 5 in legal and rng.random() < 0.2 else rng.choice(legal))
        row.advance(ids[-1])
    assert next_heads(torch.tensor([ids[:-1]]), VOCABULARY)[0].tolist() == heads
    assert set(heads) == {0, 1}


def test_an_image_opens_only_if_it_fits_with_one_more_token() -> None:
    rules = Rules(VOCABULARY)
    assert Row(rules, IMAGE + 1).legal()[5]
    assert not Row(rules, IMAGE).legal()[5]


def test_images_used_up() -> None:
    row = Row(Rules(VOCABULARY, max_images=1), 40)
    for token in (5, *[VOCABULARY.image_span.start] * CODES_PER_IMAGE, 5):
        row.advance(token)
    assert row.images == 1 and not row.legal()[5] and row.legal()[2]


def test_the_closing_control_is_forced_and_codes_exact() -> None:
    row = Row(Rules(VOCABULARY), 40)
    row.advance(5)
    start = VOCABULARY.image_span.start
    for _ in range(CODES_PER_IMAGE):
        assert row.legal().nonzero().flatten().tolist() == list(range(start, VOCABULARY.size))
        row.advance(start + 3)
    assert row.legal().nonzero().flatten().tolist() == [5]
    assert row.advance(5) is Kind.END
    assert row.phase is Phase.TEXT


def test_owed_images_keep_their_room() -> None:
    """Text may use what is left beyond two owed images and the end, and not one token more."""
    row = Row(Rules(VOCABULARY, min_images=2), 2 * IMAGE + 1 + 3)
    assert not row.legal()[2]
    for _ in range(3):
        row.advance(20)
    assert row.legal().nonzero().flatten().tolist() == [5]


def test_separate_begin_and_end_controls() -> None:
    """Chameleon's images open and close with two ids; the opening one never closes."""
    controls = VOCABULARY.controls | {"end_image": 4}
    del controls["infill"]
    other = Vocabulary(VOCABULARY.spans, controls, CODES_PER_IMAGE)
    row = Row(Rules(other), 40)
    for token in (5, *[other.image_span.start] * CODES_PER_IMAGE):
        row.advance(token)
    assert row.legal().nonzero().flatten().tolist() == [4]


def test_a_text_model_never_opens_an_image() -> None:
    row = Row(Rules(tiny_vocabulary(images=False)), 40)
    legal = row.legal().nonzero().flatten().tolist()
    assert legal[0] == 2 and legal[1] == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Rules(VOCABULARY, "video"), ["'video'", "interleaved, text, image"]),
        (lambda: Rules(VOCABULARY, min_images=3, max_images=2), ["min_images is 3", "max_images 2"]),
        (lambda: Rules(VOCABULARY, max_images=-1), ["max_images -1"]),
        (lambda: Rules(VOCABULARY, "text", min_images=1), ["mode is text", "min_images 1"]),
        (lambda: Rules(VOCABULARY, "image", max_images=0), ["mode is image", "max_images 0"]),
        (lambda: Rules(tiny_vocabulary(images=False), "image"), ["no images", "mode image"]),
    ],
)
def test_contradictions_are_refused(make, words: list[str]) -> None:
    with pytest.raises(GenerationError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)
