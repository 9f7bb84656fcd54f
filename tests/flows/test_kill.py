"""Kills at random points; ``python tests/kill_points.py --points 300`` is the long form."""

from tests.kill_points import merge_kills, training_kills

SEED = 2


def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path):
    assert merge_kills(tmp_path, points=2, seed=1)["hit a running merge"] > 0


def test_training_killed_anywhere_ends_as_if_it_never_was(tmp_path):
    """Thirty kills: while it starts, trains, saves and writes ``final/``."""
    result = training_kills(tmp_path, points=30, seed=SEED)
    assert result["kills"] == 30 and min(result[phase] for phase in ("starting", "training", "saving", "final")) > 0
    assert result["resumed"] > 10 and result["ended"] > 1
