"""What gets installed: typed, light to import, and working from a wheel."""

import contextlib
import os
import re
import subprocess
import sys
from importlib import metadata
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def required(name: str, found: set[str] | None = None) -> set[str]:
    """Names of the distributions that a distribution needs without extras, and of those that they need."""
    found = set() if found is None else found
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        needed = requirement.name.lower().replace("_", "-")
        if needed not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            with contextlib.suppress(metadata.PackageNotFoundError):
                metadata.version(needed)
                found.add(needed)
                required(needed, found)
    return found


def packages_of_others() -> list[str]:
    """Top-level packages that are installed here, but not by `pip install hf-sam`."""
    own = required("hf-sam") | {"hf-sam"}
    return sorted(
        package
        for package, distributions in metadata.packages_distributions().items()
        if not {name.lower().replace("_", "-") for name in distributions} & own and package.isidentifier()
    )


def test_importing_needs_only_what_is_installed_with_it():
    others = packages_of_others()
    assert {"trl", "peft", "datasets", "deepspeed", "bitsandbytes", "lm_eval", "matplotlib", "scipy"} <= set(others)
    program = (
        "import sys\n"
        f"for name in {others!r}: sys.modules[name] = None\n"
        "import hf_sam, hf_sam.baselines, hf_sam.evaluation, hf_sam.instruments, hf_sam.pretraining, hf_sam.report\n"
        "import hf_sam.finetuning, hf_sam.experiments.driver, hf_sam.experiments.experiment\n"
        "import hf_sam.experiments.toy_data\n"
        "for name in hf_sam.instruments.__all__: getattr(hf_sam.instruments, name)\n"
        "print(hf_sam.SAMTrainer.__name__, hf_sam.__version__)\n"
        "try: hf_sam.SAMSFTTrainer\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.split() == ["SAMTrainer", version("hf-sam")]
    assert "pip install 'hf-sam[sft]'" in second


def test_public_names_and_typing_marker():
    import hf_sam

    assert set(hf_sam.__all__) == {
        "SAMArguments",
        "SAMMixin",
        "SAMStep",
        "SAMTrainer",
        "SAMTrainingArguments",
        "__version__",
        "with_sam",
    }
    assert (Path(hf_sam.__file__).parent / "py.typed").exists()


def test_the_help_of_the_command_loads_no_heavy_package():
    program = (
        "import sys, hf_sam\n"
        "from hf_sam.commands import main\n"
        "assert main(['--help']) == 0 and main(['nothing']) == 2\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert "usage: hf-sam COMMAND" in done.stdout


def test_changelog_knows_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(version('hf-sam'))}\]", changelog, re.MULTILINE)


@pytest.mark.slow
def test_wheel_installed_in_an_empty_environment_trains(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("hf_sam-*.whl")
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=120)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, "torch"], check=True, timeout=900)
    subprocess.run([python, "-m", "pip", "install", "-q", *constraints, str(wheel)], check=True, timeout=900)
    program = """
import hf_sam, torch
from transformers import Olmo2Config, Olmo2ForCausalLM
assert "site-packages" in hf_sam.__file__
config = Olmo2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=2, pad_token_id=0)
rows = [{"input_ids": torch.arange(1, 9), "labels": torch.arange(1, 9)}] * 8
args = hf_sam.SAMTrainingArguments(output_dir="out", max_steps=2, sam_rho=0.05, use_cpu=True, report_to="none",
                                   logging_steps=1, save_strategy="no")
trainer = hf_sam.SAMTrainer(model=Olmo2ForCausalLM(config), args=args, train_dataset=rows)
trainer.train()
assert all(entry["sam/sharpness"] > 0 for entry in trainer.state.log_history[:2]), trainer.state.log_history
"""
    subprocess.run([python, "-c", program], check=True, timeout=300, cwd=tmp_path)
