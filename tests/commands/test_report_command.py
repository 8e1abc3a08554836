"""`hf-sam report` of a comparison whose evaluations are elsewhere."""

import shutil
from pathlib import Path

from hf_sam.commands import main

SUMMARY = Path(__file__).parents[2] / "recipes" / "results" / "toy-cost" / "summary.json"


def test_a_comparison_is_shown_from_its_numbers(tmp_path, capsys):
    shutil.copy(SUMMARY, tmp_path)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| momentum-noise " in shown
    assert (tmp_path / "out" / "report.md").exists()
    (tmp_path / "summary.json").write_text('{"reference": "adamw", "runs": {}}')
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the summary of a comparison by this version" in capsys.readouterr().err
    (tmp_path / "summary.json").unlink()
    assert main(["report", str(tmp_path)]) == 2
    assert "`hf-sam evaluate --output" in capsys.readouterr().err
