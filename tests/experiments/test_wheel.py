"""Experiments run from an installed wheel, outside of the repository."""

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from test_reproduce import smallest_preset

ROOT = Path(__file__).parents[2]
CONFIGS = "experiments/configs"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def environment(distributions):
    """An environment with the wheel, and with the packages that are installed here but hf-sam."""
    folder = distributions / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
    python = folder / "bin" / "python"
    (wheel,) = distributions.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, timeout=300)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in such a file is searched after the wheel, and links in it to a working copy are not followed.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def run(environment: Path, folder: Path, program: str, *argv: str, timeout: float = 300) -> str:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    command = [environment / "bin" / program, *argv]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_presets_are_planned_from_a_wheel(environment, tmp_path):
    where = run(environment, tmp_path, "python", "-c", "import hf_sam; print(hf_sam.__file__)")
    assert where.startswith(str(environment))
    said = run(environment, tmp_path, "hf-sam", "reproduce", "--preset", "toy", "--dry_run")
    assert "15 stages: data, pretrain/stable" in said
    assert "12,951,552 tokens" in said
    said = run(environment, tmp_path, "hf-sam", "reproduce", "--preset", "olmo2-1b", "--dry_run")
    assert "1,484,916,736 parameters" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_experiment_runs_from_a_wheel(environment, tmp_path):
    text = tmp_path / "text.txt"
    paragraphs = [" ".join(path.read_text(encoding="utf-8").split()) for path in sorted(ROOT.glob("hf_sam/**/*.py"))]
    text.write_text("\n\n".join(part[i : i + 400] for part in paragraphs for i in range(0, len(part), 400)))
    preset = smallest_preset(tmp_path / "smallest.yaml", text)
    argv = ["reproduce", "--preset", str(preset), "--output_dir", "out", "--workers", "2"]
    said = run(environment, tmp_path, "hf-sam", *argv, timeout=1000)
    assert "[9/9] report" in said
    assert "at equal task loss" in said
    assert (tmp_path / "out" / "evaluation" / "comparison" / "report.html").exists()
    assert "9 of 9 stages are done already." in run(environment, tmp_path, "hf-sam", *argv)


@pytest.mark.slow
def test_a_source_distribution_has_the_configs_where_the_recipes_name_them(distributions):
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    configs = {name.removeprefix(f"hf_sam/{CONFIGS}/") for name in names if name.startswith(f"hf_sam/{CONFIGS}/")}
    assert len(configs) > 40
    assert {name.removeprefix("recipes/configs/") for name in names if name.startswith("recipes/configs/")} == configs
