"""Every config file is read by the parser of its command, and says what its comments say."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hf_sam.commands import compare, pretrain, reproduce, sweep, toy_data
from hf_sam.evaluation import EvaluationArguments
from hf_sam.experiments.experiment import Experiment
from hf_sam.experiments.presets import PRESETS, read_preset
from hf_sam.experiments.stages import Chain
from hf_sam.planning import parse_tokens
from hf_sam.report.methods import group_by_seed
from hf_sam.runtime.config import read_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "hf_sam" / "experiments" / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def relative(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def parse(command, *argv):
    """As in a plan: no file here needs a GPU to be understood."""
    return command.make_parser().parse([*map(str, argv), "--dry_run"])


def flags_of_comparison(argv: list[str]) -> dict:
    """The flags of `hf-sam compare`, as they are before its runs are known."""
    parser = compare.make_parser()
    return vars(parser.parse_args(parser.prepare(argv)))


def of(folder: str) -> list[Path]:
    return [file for file in FILES if file.parent.name == folder]


def test_every_file_belongs_to_a_command():
    known = {"olmo2_1b_mid", "small", "sft", "eval", "presets", "accelerate"}
    # What presets of the toy models share is read with them.
    assert {file.parent.name for file in FILES} == known | {"toy"}


@pytest.mark.parametrize("file", of("olmo2_1b_mid"), ids=relative)
def test_mid_training(file):
    model, data, args, *_ = parse(pretrain, "--config", file)
    data.check()
    assert model.model_revision == "stage1-step1907359-tokens4001B"
    assert not model.trust_remote_code
    # The paper's table.
    assert args.max_steps == 23_842  # 50B tokens in steps of 1024 x 2048
    assert (args.gradient_accumulation_steps, args.per_device_train_batch_size) == (256, 4)
    assert (args.weight_decay, args.max_grad_norm, args.z_loss, args.seed) == (0.1, 1.0, 1e-5, 42)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.95, 1e-8)
    assert args.learning_rate == (3e-4 if file.stem == "large_lr" else 7.4487e-5)
    assert args.lr_scheduler_type == "linear"
    assert args.warmup_steps == 0
    assert sum(data.dataset_weights) == pytest.approx(100, abs=0.1)
    assert args.sam_rho == (0.05 if file.stem.startswith("sam") else 0)


def test_what_sam_changes_is_all_that_its_file_holds():
    for name in ("adamw", "sam"):
        content = yaml.safe_load((CONFIGS / "olmo2_1b_mid" / f"{name}.yaml").read_text())
        own = {key for key in content if not key.startswith("sam_")}
        assert own == {"extends", "output_dir"}
    assert not any(key.startswith("sam_") for key in read_config(CONFIGS / "olmo2_1b_mid" / "adamw.yaml"))


@pytest.mark.parametrize("file", of("small"), ids=relative)
def test_small_models(file, tmp_path):
    model = CONFIGS / "models" / "20m.json"
    flags = ["--config", file, "--config_name", model, "--output_dir", tmp_path, "--train_tokens", "4B"]
    _, data, args, *_ = parse(pretrain, *flags)
    data.check()
    assert args.sequences == 256
    assert args.sequence_length == 1024


@pytest.mark.parametrize("file", of("sft"), ids=relative)
def test_fine_tuning(file):
    data, runs, args, model, *_ = parse(sweep, "--config", file, "--dataset", "given")
    data.check()
    assert runs.learning_rates
    assert all(isinstance(rate, float) for rate in runs.learning_rates)
    assert not args.trust_remote_code
    if args.chat_template_path:
        assert Path(args.chat_template_path).is_file()
    assert args.packing == (file.stem not in ("tulu3", "hh_chosen", "sam", "sam_baseline"))
    if file.stem in ("base", "metamath"):
        assert args.max_length == 2048
        assert runs.learning_rates == [2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 8e-5, 1e-4, 1.5e-4, 2e-4]
        assert (data.train_tokens, runs.global_batch_size, args.weight_decay) == ("50M", 64, 0.0)
        assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    if file.stem == "sam":
        assert (args.sam_rho, runs.learning_rates, runs.global_batch_size) == (2.0, [5e-6], 128)
    assert model.use_peft == (file.stem == "lora")


@pytest.mark.parametrize("file", of("eval"), ids=relative)
def test_evaluation(file):
    flags = flags_of_comparison(["--config", str(file), "--runs", "a=x", "b=y"])
    assert flags.pop("runs") == ["a=x", "b=y"]
    flags = {name: value for name, value in flags.items() if name not in ("config", "dry_run")}
    assert "nf4" in EvaluationArguments(**{**flags, "base": "x"}).quantize


@pytest.mark.parametrize("file", of("accelerate"), ids=relative)
def test_accelerate(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    kind = {"ddp": "MULTI_GPU", "multi_node": "MULTI_GPU", "fsdp2": "FSDP"}.get(file.stem, "DEEPSPEED")
    assert config.distributed_type.value == kind
    assert config.num_processes == 8 * config.num_machines
    if file.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if file.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])


@pytest.mark.parametrize("file", of("presets"), ids=relative)
@pytest.mark.parametrize("devices", [1, 8])
def test_presets(file, devices, tmp_path):
    """The settings of each stage are read by the command that it runs."""
    preset = read_preset(file.stem)
    preset["seeds"] = (preset.get("seeds") or [None])[:1]  # the others differ in nothing else
    experiment = Experiment(preset, tmp_path, devices)
    stages = experiment.stages()
    Chain(stages, tmp_path)  # every stage that one needs exists
    checkpoint = tmp_path / "checkpoint-1000"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1000}')
    for stage in stages:
        path = tmp_path / f"{stage.name.replace('/', '-')}.yaml"
        path.write_text(yaml.safe_dump(stage.settings))
        kind = stage.name.split("/")[0]
        if kind in ("pretrain", "anneal"):
            late = {}
            if kind == "anneal" and experiment.source(experiment.runs("anneal")[stage.name.split("/")[1]]):
                late["anneal_from"] = str(checkpoint)
            path.write_text(yaml.safe_dump({**stage.settings, **late}))
            args = parse(pretrain, "--config", path)[2]
            assert (args.anneal_steps is not None) == bool(late)
            assert stage.command == "pretrain"
        elif kind == "sft":
            parse(sweep, "--config", path)
            assert stage.command == "sweep"
        elif kind == "data":
            toy_data.make_parser().parse(["--config", str(path)])
            assert stage.command == "toy-data"
        else:
            assert stage.command == "compare"
            flags = flags_of_comparison(["--config", str(path)])
            assert len(flags["runs"]) == 1 or kind == "report"
    names = [stage.name for stage in stages]
    reports = [stage for stage in stages if stage.name.startswith("report")]
    compared = [run.split("=")[1] for stage in reports for run in stage.settings["runs"]]
    assert len(compared) == len(set(compared)) == len(experiment.runs("anneal")) * max(1, len(experiment.runs("sft")))
    for stage in reports:  # against a run without SAM
        assert "adamw" in stage.settings["runs"][0].split("=")[0]
    wide = {stage.name.split("/")[0] for stage in stages if stage.wide}
    on_gpus = devices > 1 and preset["device"] == "gpu"
    kinds = {name.split("/")[0] for name in names}
    # On the CPU, the only pretraining has all of it.
    alone = {"pretrain"} if devices > 1 and len(experiment.runs("pretrain")) == 1 else set()
    assert wide == ({"pretrain", "anneal"} & kinds if on_gpus else alone & kinds)


@pytest.mark.parametrize("name", ["toy", "olmo2-1b"])
def test_with_seeds_each_run_has_its_own_pretraining_data_order_sweep_and_evaluation(name, tmp_path):
    preset = read_preset(name)
    plain = Experiment({**preset, "seeds": None}, tmp_path, 8).stages()
    experiment = Experiment({**preset, "seeds": [3, 4]}, tmp_path, 8)
    stages = Chain(experiment.stages(), tmp_path).stages
    shared = [stage.name for stage in plain if stage.name in ("data", "report")]
    assert len(stages) == len(shared) + 2 * (len(plain) - len(shared))
    for seed in (3, 4):
        anneal = stages[f"anneal/adamw/seed-{seed}"]
        assert anneal.settings["seed"] == seed
        assert anneal.settings["output_dir"] == str(tmp_path / "anneal" / "adamw" / f"seed-{seed}")
        if name == "toy":
            assert anneal.needs == (f"pretrain/stable/seed-{seed}",)
            assert stages[f"pretrain/stable/seed-{seed}"].settings["seed"] == seed
        (sweep, *_) = (one for one in stages.values() if one.name.startswith(f"sft/adamw/seed-{seed}"))
        assert sweep.settings["seed"] == seed
        assert sweep.settings["model_name_or_path"] == anneal.settings["output_dir"]
        assert stages[f"evaluate/adamw/seed-{seed}"].settings["runs"][0].startswith(f"adamw-seed-{seed}=")
    runs = [run.partition("=")[0] for run in stages["report"].settings["runs"]]
    methods = group_by_seed([SimpleNamespace(name=run) for run in runs])
    assert {method.name: list(method.by_seed) for method in methods} == {
        method: [3, 4] for method in experiment.runs("anneal")
    }


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (("toy-interval", "toy-cost"), ["adamw", "sam", "sam-every-10", "sam-every-10-quarter"]),
        (("overtrained", "sam-in-sft"), ["adamw", "momentum-noise"]),
    ],
)
def test_presets_that_share_a_folder_share_their_runs(tmp_path, names, common):
    chains = [
        {stage.name: stage for stage in Experiment({**read_preset(name), "seeds": [4]}, tmp_path, 1).stages()}
        for name in names
    ]
    shared = chains[0].keys() & chains[1].keys()
    assert {"data", "pretrain/stable/seed-4", *(f"anneal/{name}/seed-4" for name in common)} <= shared
    different = {name for name in shared if chains[0][name].settings != chains[1][name].settings}
    assert different <= {"report"}
    for chain in chains:
        assert all(stage.replaceable == name.startswith("report") for name, stage in chain.items())


@pytest.mark.parametrize("seeds", [[1, 1], [-1], 3, ["one"], [1.5], [True]])
def test_seeds_are_different_integers(seeds, tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"extends": str(PRESETS / "toy.yaml"), "seeds": seeds}))
    with pytest.raises(ValueError, match="must be a list of different integers"):
        read_preset(str(tmp_path / "own.yaml"))


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no preset '7b'; choose from 150m, .*20m"):
        read_preset("7b")
    (tmp_path / "own.yaml").write_text("aneal: {}\n")
    with pytest.raises(ValueError, match="sets 'aneal'; its keys are"):
        read_preset(str(tmp_path / "own.yaml"))
    with pytest.raises(ValueError, match="needs GPUs, and there are none"):
        reproduce.find_devices({"device": "gpu"}, 0)


RECIPES = {"olmo_mid_sam": pretrain, "metamath_sft": sweep, "quantize_eval": compare, "reproduce": reproduce}
SHOWN = [
    (page.name, recipe, flags)
    for page in (ROOT / "README.md", ROOT / "recipes" / "README.md")
    for recipe, flags in re.findall(r"recipes/(\w+)\.py (--[^`\n]*)", page.read_text())
]


@pytest.mark.parametrize(("page", "recipe", "flags"), SHOWN)
def test_commands_that_are_shown_are_understood(page, recipe, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = shlex.split(flags)
    if recipe == "quantize_eval":
        assert len(flags_of_comparison(argv)["runs"]) == 2
        return
    first = parse(RECIPES[recipe], *argv)[0]
    if recipe == "reproduce":
        chain = Chain(Experiment(read_preset(first.preset), Path("outputs"), 8).stages(), Path("outputs"))
        assert first.stage is None or chain[first.stage]


def test_many_commands_are_shown():
    assert len(SHOWN) >= 14
    assert {recipe for _, recipe, _ in SHOWN} == set(RECIPES)


def test_linked_files_of_the_tour_exist():
    page = (ROOT / "recipes" / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (ROOT / "recipes" / path).exists(), path


def test_the_recipes_find_the_configs_of_the_package():
    """Commands name `recipes/configs`: a link in a clone, a copy in a source distribution."""
    linked = ROOT / "recipes" / "configs"
    files = [path for path in sorted(CONFIGS.rglob("*")) if path.is_file()]
    assert len(files) > 40
    for file in files:
        assert (linked / file.relative_to(CONFIGS)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("recipe", [*RECIPES, "quickstart"])
def test_recipes_are_short_scripts(recipe):
    assert len((ROOT / "recipes" / f"{recipe}.py").read_text().splitlines()) < 50


def test_checkpoints_that_presets_anneal_from_are_kept():
    for file in of("presets"):
        experiment = Experiment(read_preset(file.stem), Path("out"), 1)
        for run in experiment.runs("anneal").values():
            source = experiment.source(run)
            if source is not None and source[1] is not None:
                settings = experiment.settings("pretrain", experiment.runs("pretrain")[source[0]])
                tokens = settings["global_batch_size"] * settings["sequence_length"]
                last = -(-parse_tokens(settings["train_tokens"]) // tokens)
                kept = settings["save_steps"] * (settings["save_total_limit"] - 1)
                assert last - kept <= source[1] <= last, (file.stem, source)


def test_each_run_is_planned_with_its_own_model(tmp_path):
    asked = []
    Experiment(read_preset("radius"), tmp_path, 1).plan(lambda command, settings: asked.append(settings) or "")
    shapes = [(Path(one["config_name"]).stem, one["train_tokens"]) for one in asked if "config_name" in one]
    assert shapes[:3] == [("toy_small", "17268736"), ("toy", "28000000"), ("toy_large", "81700000")]
    assert [shape for shape, _ in shapes[3:]] == ["toy_small"] * 7 + ["toy"] * 7 + ["toy_large"] * 7
