"""transformers' ``generate`` with jam's decoder: the same tokens, its shapes, its streamers."""

from pathlib import Path

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from jam.decode.custom_generate import custom_generate
from jam.decode.engine import generate
from jam.decode.options import SamplingOptions
from jam.document import Document, TextPart
from jam.errors import GenerationError
from jam.models.load import Bundle
from jam.tokens.render import render
from tests.decode.bundles import cross_bundle, plain_bundle

PROMPTS = [Document((TextPart("draw a cat", "user"),)), Document((TextPart("on"),))]
OPTIONS = SamplingOptions(max_tokens=30, min_images=1, text_temperature=1.0, guidance_scale=2.0)


@pytest.fixture(scope="module", params=[plain_bundle, cross_bundle])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("custom")
    return request.param(folder)


def padded(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    prompts = [render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist() for prompt in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask, prompts


def test_it_returns_prompts_and_replies(bundle: Bundle) -> None:
    ids, mask, _ = padded(bundle)
    out = bundle.model.generate(
        ids, attention_mask=mask, max_new_tokens=30, custom_generate=custom_generate(bundle, OPTIONS)
    )
    assert torch.equal(out[:, : ids.shape[1]], ids)
    steps = list(generate(bundle, PROMPTS, OPTIONS))
    for row in range(2):
        reply = [step.token for step in steps if step.row == row]
        found = out[row, ids.shape[1] :].tolist()
        assert found[: len(reply)] == reply and set(found[len(reply) :]) <= {1}


def test_max_new_tokens_bounds_the_reply(bundle: Bundle) -> None:
    ids, mask, _ = padded(bundle)
    out = bundle.model.generate(
        ids, attention_mask=mask, max_new_tokens=9, custom_generate=custom_generate(bundle, OPTIONS)
    )
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 9
    with pytest.raises(GenerationError, match="max_tokens is 5; a reply with 1 images needs 7"):
        bundle.model.generate(
            ids, attention_mask=mask, max_new_tokens=5, custom_generate=custom_generate(bundle, OPTIONS)
        )


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_id(bundle: Bundle) -> None:
    _, _, prompts = padded(bundle)
    kept = Kept()
    out = bundle.model.generate(
        torch.tensor(prompts[:1]), max_new_tokens=30, custom_generate=custom_generate(bundle, OPTIONS, kept)
    )
    assert kept.ids == out[0].tolist() and kept.ended
    ids, mask, _ = padded(bundle)
    with pytest.raises(GenerationError, match="a streamer takes one prompt, there are 2"):
        bundle.model.generate(
            ids, attention_mask=mask, max_new_tokens=30, custom_generate=custom_generate(bundle, OPTIONS, kept)
        )


def test_a_prompt_inside_an_image_is_refused(bundle: Bundle) -> None:
    begin = bundle.vocabulary.controls["begin_image"]
    with pytest.raises(GenerationError, match="prompt 0 ends inside an image"):
        bundle.model.generate(
            torch.tensor([[0, 80, begin]]), max_new_tokens=30, custom_generate=custom_generate(bundle, OPTIONS)
        )
