"""``accelerate launch`` with the shipped configs."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from finetune.run import run_finetune
from finetune.scale import engines
from jam.errors import RunError
from tests.laws.ranks import ROOT, finished
from tests.laws.test_scale_runs import recipe_at, written
from tests.laws.test_training_laws import final_weights

CONFIGS = ROOT / "recipes" / "launch"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_every_config(name, kind):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type.name == kind and config.mixed_precision == "no"
    assert (config.fsdp_config or {}).get("fsdp_version", 2) == 2
    assert (config.deepspeed_config or {}).get("zero_stage", 3) == 3


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_launch_trains_what_one_process_trains(tmp_path, name):
    if name == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is no dependency")
    file = written(tmp_path, cross=True)
    raw = json.loads(file.read_text())
    raw["train"] |= {"ema": None, "steps": 4}
    file.write_text(json.dumps(raw))
    done = finished([*ACCELERATE, str(CONFIGS / f"{name}.yaml"), "-m", "jam.cli", "finetune", str(file)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained model: ") == 1
    assert done.stderr.count(f"{'FSDP2' if name == 'fsdp2' else 'ZeRO-3'} on 2 processes (cpu)") == 1
    record = json.loads((tmp_path / "run/env.json").read_text())
    assert (record["engine"], record["processes"]) == ({"fsdp2": "FSDP2", "zero3": "ZeRO-3"}[name], 2)
    one = run_finetune(recipe_at(file, tmp_path / "one"))
    for key, tensor in final_weights(one).items():
        torch.testing.assert_close(final_weights(tmp_path / "run/final")[key], tensor, rtol=1e-4, atol=2e-5)


def test_deepspeed_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="pip install deepspeed"):
        engines.start_processes()
