"""The benchmarks run; what they measure is not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_cost_of_a_step_is_measured_in_bf16_with_one_micro_batch(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "step_cost.py", "--precisions", "bf16", "--accumulation", "1", "--rounds", "1"]
    command += ["--steps", "1", "--batch_size", "1", "--length", "16", "--memory", "false", "--json", str(found)]
    done = subprocess.run(
        [*command, "--kinds", "momentum"], cwd=ROOT / "benchmarks", env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| momentum |" in done.stdout
    assert "momentum" in json.dumps(json.loads(found.read_text()))
