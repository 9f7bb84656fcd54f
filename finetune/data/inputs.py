"""What a run is made from beside its recipe, as hashes: none goes on over other data, or another base, unasked.

Sources give SHA-256 of their content (``finetune.data.sources``: files as they are, pixels as they are read; of a
prepared folder its source.json, which has the hashes of its shards). A model gives what its ids mean and its
config.json; its weights only under adapters, which a checkpoint keeps without them. 14 GB take about ten seconds to
hash, once a start.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from finetune.data.shards import Identity
from finetune.data.sources import Source
from finetune.recipe import FinetuneRecipe
from jam.checkpoint import read_json
from jam.digest import sha256_of
from jam.models.load import Bundle


def inputs_of(bundle: Bundle, recipe: FinetuneRecipe, sources: Sequence[Source]) -> dict[str, str]:
    """Hashes by dotted name, as ``resume_allow`` and errors have them."""
    identity = asdict(Identity.of(bundle.path, bundle.vocabulary, bundle.image))
    found = {f"content.model.{name}": value for name, value in identity.items() if value is not None}
    if (bundle.path / "config.json").is_file():
        settings = {k: v for k, v in read_json(bundle.path / "config.json").items() if k != "transformers_version"}
        found["content.model.config"] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if recipe.lora is not None:
        weights = "".join(map(sha256_of, sorted(bundle.path.glob("*.safetensors"))))
        found["content.model.weights"] = hashlib.sha256(weights.encode()).hexdigest()
    return found | {f"content.data.mix.{source.name}": source.content for source in sources}


def changed_inputs(recorded: dict[str, str], now: dict[str, str]) -> list[str]:
    """``name: was a, is b`` of what both have; what only one has is a changed setting, and named as such."""
    both = sorted(recorded.keys() & now.keys())
    return [f"{name}: was {recorded[name][:12]}, is {now[name][:12]}" for name in both if recorded[name] != now[name]]


def refused(changes: list[str], allow: Sequence[str]) -> list[str]:
    """The changes that ``resume_allow`` does not name.

    >>> refused(["optim.lr: was 1, is 2", "optim.clip: was 1, is 2", "optim.eps: was 1, is 2"], ["optim.lr", "optim.e"])
    ['optim.clip: was 1, is 2', 'optim.eps: was 1, is 2']
    """

    def allowed(change: str) -> bool:
        name = change.split(": was ")[0]
        return any(name == one or name.startswith(f"{one}.") for one in allow)

    return [change for change in changes if not allowed(change)]
