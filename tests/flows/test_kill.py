"""A few kills of each kind; ``python tests/kill_points.py --points 20`` is the long form."""

from tests.kill_points import merge_kills, training_kills


def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path):
    assert merge_kills(tmp_path, points=2, seed=1)["hit a running merge"] > 0


def test_training_killed_while_it_writes_goes_on_from_the_last_good_step(tmp_path):
    result = training_kills(tmp_path, points=2, seed=2, in_write=True, steps=12)
    assert result["hit a running process"] == 2
