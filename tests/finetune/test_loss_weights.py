"""Which tokens carry how much loss: by role, by message and part, by modality, by source; they multiply."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data.readers.forms import Context, messages
from finetune.data.readers.media import Media
from finetune.data.sources import open_source, pieces
from finetune.loss import position_weights
from finetune.order.pack import Placed, collate
from finetune.order.plan import PackedSource
from finetune.recipe import LossSection, Source
from jam.document import Document, from_messages
from jam.errors import DataError
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import IMAGE_HEAD, Tokens
from jam.tokens.vocabulary import IMAGE, TEXT
from tests.laws.test_data_laws import recipe_for
from tests.tiny import tiny_pair

PICTURE = {"type": "image", "path": "a.png"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return load_bundle(tiny_pair(tmp_path_factory.mktemp("weights"))[1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    return tmp_path


def talk(user: dict, *assistant: dict) -> list[dict]:
    return [{"role": "user", "content": [PICTURE, {"type": "text", "text": "the cat"}]} | user, *assistant]


def says(content: object, **more: object) -> dict:
    return {"role": "assistant", "content": content} | more


BOTH = [{"type": "text", "text": "here it is"}, PICTURE]


def tokens_of(root: Path, bundle: Bundle, turns: list[dict], **settings) -> Tokens:
    file = root / "talk.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n")
    source = open_source("talk", Source(kind="conversations", path=str(file), weight=1.0, **settings), bundle)
    (tokens,) = pieces(source, bundle, 0, 0.0, 256)
    return tokens


def by_turn(tokens: Tokens, bundle: Bundle) -> list[dict[str, set[float]]]:
    """Weights of text and codes in each turn; controls apart."""
    controls, kinds = bundle.vocabulary.controls, bundle.vocabulary.kinds()
    turn = np.cumsum(np.isin(tokens.ids, (controls["user"], controls["assistant"])))
    return [
        {
            name: set(tokens.weights[(turn == number) & (kinds[tokens.ids] == kind)].tolist())
            for name, kind in (("text", TEXT), ("image", IMAGE))
        }
        for number in range(1, int(turn.max()) + 1)
    ]


def test_the_assistant_is_learnt_images_included_and_the_user_is_not(root, bundle):
    tokens = tokens_of(root, bundle, talk({}, says(BOTH)))
    assert by_turn(tokens, bundle) == [{"text": {0.0}, "image": {0.0}}, {"text": {1.0}, "image": {1.0}}]
    controls = bundle.vocabulary.controls
    opens = tokens.weights[tokens.ids == controls["begin_image"]].tolist()  # opened and closed: the user's, ours
    assert opens == [0.0, 0.0, 1.0, 1.0]
    assert tokens.weights[tokens.ids == controls["assistant"]].tolist() == [0.0]
    assert tokens.weights[-1] == 1.0  # when to stop is learnt


def test_a_message_and_a_part_may_have_a_weight_of_their_own(root, bundle):
    half = [{"type": "text", "text": "here it is", "weight": 0.5}, PICTURE]
    turns = [*talk({"weight": 0.25}, says(BOTH, weight=0)), {"role": "user", "content": "in"}, says(half, weight=2)]
    assert by_turn(tokens_of(root, bundle, turns), bundle) == [
        {"text": {0.25}, "image": {0.25}},
        {"text": {0.0}, "image": {0.0}},
        {"text": {0.0}, "image": set()},
        {"text": {0.5}, "image": {2.0}},
    ]


def test_the_messages_reader_keeps_weights_of_messages_and_parts(root):
    row = {
        "messages": [
            {"role": "user", "content": "<image> the cat"},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "<image> and", "weight": 3}, PICTURE],
                "weight": 0,
            },
            {"role": "assistant", "content": "in"},
        ],
        "images": ["a.png", "a.png"],
    }
    document: Document = messages(row, Context(Media(root)))
    assert [part.loss for part in document.parts] == [0.0, 0.0, 3.0, 3.0, 0.0, 1.0]


@pytest.mark.parametrize("weight", ["1", -1, True, [1], 10**400, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused_with_its_place(weight):
    with pytest.raises(DataError, match=r"messages\[0\]\.weight is .*from 0 to 1000 is required"):
        from_messages([says("in", weight=weight)], lambda path: (0,))
    with pytest.raises(DataError, match=r"messages\[0\]\.content\[0\]\.weight is"):
        from_messages([says([{"type": "text", "text": "in", "weight": weight}])], lambda path: (0,))


def test_weights_of_part_source_and_run_multiply(root, bundle):
    turns = talk({}, says([{"type": "text", "text": "here", "weight": 0.5}, PICTURE]))
    tokens = tokens_of(root, bundle, turns, loss={"text": 4.0, "image": 3.0})
    batch = collate([[Placed(tokens, 0)]], [0], len(tokens), bundle.vocabulary.controls["pad"])
    found = position_weights(batch, LossSection(text=10.0, image=100.0))[0, :-1]
    expected = tokens.weights[1:] * np.where(tokens.heads[1:] == IMAGE_HEAD, 100.0, 10.0)
    assert torch.allclose(found, torch.from_numpy(expected.astype(np.float32)))
    assert {20.0, 300.0, 0.0} <= set(found.tolist())


def test_every_source_has_its_own_weights(root, bundle):
    recipe = recipe_for(root)
    entries = {name: entry.model_dump() for name, entry in recipe.data.mix.items()}
    entries["a"]["loss"] = {"text": 0.25, "image": 1.0}
    sources = [open_source(name, Source.model_validate(entry), bundle) for name, entry in entries.items()]
    packed = [PackedSource(s, number, bundle, recipe, 256) for number, s in enumerate(sources)]
    batch = collate([p.sequence(0) for p in packed], [0, 1], 64, 1)
    weights = position_weights(batch, LossSection())
    assert set(weights[0].tolist()) == {0.0, 0.25} and set(weights[1].tolist()) == {0.0, 1.0}
