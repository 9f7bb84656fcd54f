"""What the demo holds out, shows and chooses: fixed, spread."""

from pathlib import Path

from finetune.data import mini_data
from finetune.data.held_out import spread
from jam.demo import choose, train_recipe
from jam.demo_bench import Settings
from jam.demo_samples import held_out_questions


def test_questions_are_held_out_and_show_every_kind_of_turn():
    rows = held_out_questions(4)
    assert [row["split"] for row in rows] == ["wording"] * 4 + ["subject"] * 4
    asked = [row["messages"][0] for row in rows]
    assert all(message["role"] == "user" for message in asked)
    kinds = {block["type"] for message in asked for block in message["content"]}
    assert kinds == {"text", "image"}
    trained = {row["messages"][0]["content"][0].get("text") for row in mini_data.conversations("train")}
    texts = [m["content"][0].get("text") for m, row in zip(asked, rows, strict=True) if row["kind"] != "what-is-this"]
    assert texts and not set(texts) & trained


def test_the_rule_takes_the_lowest_sum_of_relative_increases():
    """a is best at text and b at images; the sums of relative increases are 0.5, 0.2 and 0.3."""
    measured = {
        "a": {"text": 2.0, "image": 6.0},
        "b": {"text": 2.4, "image": 4.0},
        "c": {"text": 2.2, "image": 4.8},
    }
    choice = choose(measured, {"text": 2.0, "image": 4.0})
    assert choice["best"] == "b"
    assert {name: round(value, 9) for name, value in choice["sums"].items()} == {"a": 0.5, "b": 0.2, "c": 0.3}


def test_every_method_trains_on_the_same_sequences():
    settings, shares = Settings("text", "image"), {"text": 0.5, "captions": 0.5}
    recipes = [
        train_recipe(settings, Path("m"), Path("o"), 65_536, optimizer, cross, shares)
        for optimizer, cross in ((("adamw", 1e-3), False), (("muon", 5e-4), True))
    ]
    assert recipes[0].data == recipes[1].data and recipes[0].train == recipes[1].train
    assert recipes[0].train.steps * settings.seq_len * settings.batch == 65_536
    assert not recipes[0].optim.groups and recipes[1].optim.groups[0].lr_mul < 1


def test_spread_is_even_and_never_repeats():
    assert spread(range(10), 10) == list(range(10)) == spread(range(10), 99)
    assert spread(range(100), 4) == [12, 37, 62, 87]
    assert spread([], 3) == []
