"""`hf-sam suggest-rho`: its radii are those of the instrument, and its command trains."""

import json
import re
import shlex

import pytest
import torch

from hf_sam.commands import main
from hf_sam.commands.suggest_rho import STARTS, SuggestRhoArguments, advice
from hf_sam.instruments import RadiusProfile


def flags(files, **changes):
    settings = {"data": files / "corpus.txt", "max_length": 16, "ascent_batch_size": 4, "batches": 2, **changes}
    return [str(files / "model"), *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def test_at_the_radii_that_it_suggests_the_loss_rises_as_it_says(files, tmp_path, capsys):
    """Measured again at those radii."""
    assert main(["suggest-rho", *flags(files)]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if "--sam_" in line and line.startswith("| ")]
    wanted = [start for start in STARTS if "asam" not in start.rises]
    assert len(table) == len(wanted)
    for start, line in zip(wanted, table, strict=True):
        assert start.what in line
        radii = re.search(start.flags.format(**dict.fromkeys(start.rises, r"(\S+)")), line).groups()
        for (kind, rise), radius in zip(start.rises.items(), radii, strict=True):
            again = tmp_path / f"{start.what}.json"
            assert main(["suggest-rho", *flags(files, json=again), "--kinds", kind, "--rhos", radius]) == 0
            profile = json.loads(again.read_text())[kind]
            assert profile["rhos"] == [float(radius)]
            # Two digits of a radius that is interpolated on a grid of factor 2.
            assert profile["mean_rises"] == [pytest.approx(rise, rel=0.15)]


def test_it_says_where_batches_differ_too_much():
    even, uneven = ((0.1, 0.3), (0.2, 0.5)), ((0.01, 0.02), (0.2, 1.5))
    settings = SuggestRhoArguments(data="texts.jsonl")
    profiles = {
        kind: RadiusProfile((0.1, 0.2), rises, (2.0, 2.0), (0.0, 0.0), 4, 100, kind)
        for kind, rises in (("noise", even), ("momentum", uneven))
    }
    assert "Batches differ much in the rise for momentum: take more" in advice(profiles, settings, "model")
    assert "differ" not in advice({"noise": profiles["noise"]}, settings, "model")


def test_its_command_names_the_column_of_the_data():
    profiles = {"noise": RadiusProfile((0.1, 0.2), ((0.1, 0.3),), (2.0,), (0.0,), 4, 100, "noise")}
    named = {
        column: advice(profiles, SuggestRhoArguments(data="texts.jsonl", data_column=column), "model").splitlines()[-1]
        for column in ("text", "body", "messages")
    }
    assert named["text"].startswith("hf-sam clm ")
    assert "--dataset_text_field" not in named["text"]
    assert "--dataset_text_field body" in named["body"]
    assert named["messages"].startswith("hf-sam sft ")


def test_a_loss_that_overflows_is_null_in_the_json_file(files, tmp_path, capsys):
    path = tmp_path / "new" / "numbers.json"
    assert main(["suggest-rho", *flags(files, json=path), "--kinds", "sam", "--rhos", "0.01", "1e30"]) == 0

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)["sam"]
    assert found["mean_rises"][0] > 0
    assert found["mean_rises"][1] is None
    assert found["rhos"] == [0.01, 1e30]


def test_its_command_trains(files, tmp_path, capsys):
    assert main(["suggest-rho", *flags(files)]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[0] == "hf-sam"
    command[command.index("--output_dir") + 1] = str(tmp_path / "out")
    rest = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to", "none", "--logging_steps", "1"]
    assert main([*command[1:], *rest]) == 0
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert args.sam_variant == "momentum"
    assert (args.sam_rho, args.sam_noise) == tuple(
        float(command[command.index(f"--sam_{x}") + 1]) for x in ("rho", "noise")
    )
    assert args.sam_noise > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "give --data"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"batches": 0}, "--batches 0 must be 1 or larger"),
        ({"ascent_batch_size": 4000}, "rows, but 2 batches of 4000 rows need 8000"),
        ({"kinds": "friendly"}, "--kinds friendly must be some of momentum, noise, sam, asam"),
        ({"rhos": -1}, "rhos=[-1.0] must be positive"),
        ({"device": "auto"}, "--device auto spreads"),
        ({"json": "/dev/null/numbers.json"}, "cannot be written to: /dev/null is a file"),
        ({"max_length": 10**6}, "takes 32 tokens at most"),
        ({"sam_roh": 1}, "unrecognized argument --sam_roh"),
    ],
)
def test_what_cannot_be_measured_is_answered_in_a_line(files, capsys, changes, message):
    assert main(["suggest-rho", *flags(files, **changes)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-sam suggest-rho: ")]
    assert len(lines) == 1
    assert message in lines[0]
