"""How often a run reads its sources: what is said beforehand is what the plan then does."""

import pytest

from finetune.data.sources import open_source
from finetune.order.plan import BLOCK, PackedSource, Plan
from finetune.order.supply import check_supply, sequences_of
from finetune.recipe import FinetuneRecipe
from jam.errors import DataError
from jam.models.load import load_bundle
from tests.laws.test_data_laws import plan_for, recipe_for
from tests.tiny import tiny_pair


def read(plan: Plan, total: int) -> list[list[int]]:
    """Documents of every source in the first ``total`` sequences."""
    found: list[list[int]] = [[] for _ in plan.sources]
    for t in range(total):
        owner, sequence = plan.sequence(t)
        found[owner] += [placed.document for placed in sequence]
    return found


def test_sequences_of_a_source_are_arithmetic(tmp_path):
    tiny_pair(tmp_path)
    plan = plan_for(tmp_path)
    for total in (0, 1, 37, BLOCK, 2 * BLOCK + 63):
        owners = [plan.owner(t)[0] for t in range(total)]
        assert sequences_of(plan, total) == [owners.count(0), owners.count(1)]


def test_what_is_said_is_what_is_read(tmp_path):
    tiny_pair(tmp_path)
    recipe, plan = recipe_for(tmp_path), plan_for(tmp_path)
    told: list[str] = []
    check_supply(plan, recipe, 60, told.append)
    said = {line.split(":")[0]: float(line.split(" ")[2]) for line in told}
    documents = read(plan, 60 * recipe.train.global_batch_size)
    for name, numbers, size in zip("ab", documents, (40, 7), strict=True):
        assert said[name] == pytest.approx(len(numbers) / size, rel=0.15), (
            told
        )  # CM3 grows documents otherwise in each epoch
        assert f"of {size} documents" in "".join(told)


def test_a_limit_on_epochs_stops_a_run_before_it_begins(tmp_path):
    tiny_pair(tmp_path)
    plan = plan_for(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    epochs = len(read(plan, 240)[1]) / 7
    for limit, fits in ((epochs * 1.2, True), (epochs * 0.8, False)):
        raw["data"]["mix"]["b"]["max_epochs"] = limit
        recipe = FinetuneRecipe.model_validate(raw)
        if fits:
            check_supply(plan, recipe, 60, lambda line: None)
        else:
            with pytest.raises(DataError, match=r"mix\.b: the run reads 7 documents about .* times .\d\d sequences"):
                check_supply(plan, recipe, 60, lambda line: None)


def test_documents_left_out_are_read_by_nobody_and_the_rest_is(tmp_path):
    tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["data"]["mix"]["a"]["skip"] = [3, 39]
    recipe = FinetuneRecipe.model_validate(raw)
    bundle = load_bundle(recipe.model)
    sources = [open_source(name, entry, bundle) for name, entry in recipe.data.mix.items()]
    plan = Plan([PackedSource(s, n, bundle, recipe, 256) for n, s in enumerate(sources)], [0.7, 0.3], seed=0)
    assert set(read(plan, 120)[0]) == set(range(40)) - {3, 39} and set(read(plan, 120)[1]) == set(range(7))
