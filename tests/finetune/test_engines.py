"""What a sharding engine asks of the model and of accelerate's config; tests/laws/test_scale_laws.py has the rest."""

from collections import Counter

import pytest
from accelerate import Accelerator

from finetune.loss import TokenLoss
from finetune.recipe import LossSection
from finetune.scale.engines import Fsdp2, sharded_layers
from jam.errors import RunError
from jam.models.load import load_bundle
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross


def test_layers_of_both_towers_and_exchanges_are_gathered_one_by_one(tmp_path):
    text, image = tiny_pair(tmp_path, text_family="llama")
    network = TokenLoss(load_bundle(tiny_cross(tmp_path / "fused", text, image)), LossSection())
    found = Counter(type(layer).__name__ for layer in sharded_layers(network))
    assert found == {"LlamaDecoderLayer": 4, "OPTDecoderLayer": 4, "Exchange": 2}
    assert len(sharded_layers(network, ["Exchange"])) == 2
    with pytest.raises(RunError, match="names MistralDecoderLayer, which this model has not"):
        sharded_layers(network, ["MistralDecoderLayer"])


def test_the_first_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RunError, match="fsdp_version is 1"):
        Fsdp2(Accelerator(cpu=True), bf16=False)
