"""Every YAML file under recipes/ is read by the parser that will read it, and says what its comments say."""

import re
import shlex
from pathlib import Path

import metamath_sft
import olmo_mid_sam
import pytest
import quantize_eval
import reproduce
import toy_data
import yaml
from configuration import RecipeParser, read_config
from stages import Stages

from hf_sam.evaluation import EvaluationArguments

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def relative(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def parse(recipe, *argv):
    """As in a plan: no file here needs a GPU to be understood."""
    return recipe.make_parser().parse([*map(str, argv), "--dry_run"])


def of(folder: str) -> list[Path]:
    return [file for file in FILES if file.parent.name == folder]


def test_every_file_belongs_to_a_recipe():
    assert {file.parent.name for file in FILES} == {"olmo2_1b_mid", "small", "sft", "eval", "presets", "accelerate"}


@pytest.mark.parametrize("file", of("olmo2_1b_mid"), ids=relative)
def test_mid_training(file):
    model, data, args, *_ = parse(olmo_mid_sam, "--config", file)
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
    _, data, args, *_ = parse(olmo_mid_sam, *flags)
    data.check()
    assert args.sequences == 256
    assert args.sequence_length == 1024


@pytest.mark.parametrize("file", of("sft"), ids=relative)
def test_fine_tuning(file):
    data, sweep, args, model, *_ = parse(metamath_sft, "--config", file, "--dataset", "given")
    data.check()
    assert sweep.learning_rates
    assert all(isinstance(rate, float) for rate in sweep.learning_rates)
    assert not args.trust_remote_code
    if args.chat_template_path:
        assert Path(args.chat_template_path).is_file()
    assert args.packing == (file.stem not in ("tulu3", "hh_chosen", "sam", "sam_baseline"))
    if file.stem in ("base", "metamath"):
        assert args.max_length == 2048
        assert sweep.learning_rates == [2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 8e-5, 1e-4, 1.5e-4, 2e-4]
        assert (data.train_tokens, sweep.global_batch_size, args.weight_decay) == ("50M", 64, 0.0)
        assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    if file.stem == "sam":
        assert (args.sam_rho, sweep.learning_rates, sweep.global_batch_size) == (2.0, [5e-6], 128)
    assert model.use_peft == (file.stem == "lora")


@pytest.mark.parametrize("file", of("eval"), ids=relative)
def test_evaluation(file):
    flags = quantize_eval.QuantizeEvalParser().parse(["--config", str(file), "--runs", "a=x", "b=y"])
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
    """Each stage's own settings are read by the recipe that it runs."""
    experiment = reproduce.Experiment(reproduce.read_preset(file.stem), tmp_path, devices)
    stages = experiment.stages()
    Stages(stages, tmp_path)  # all that they need is there
    checkpoint = tmp_path / "checkpoint-1000"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1000}')
    for stage in stages:
        path = tmp_path / f"{stage.name.replace('/', '-')}.yaml"
        path.write_text(yaml.safe_dump(stage.settings))
        kind = stage.name.split("/")[0]
        if kind in ("pretrain", "anneal"):
            late = {}
            if kind == "anneal" and experiment.runs("pretrain"):
                late["anneal_from"] = str(checkpoint)
            path.write_text(yaml.safe_dump({**stage.settings, **late}))
            args = parse(olmo_mid_sam, "--config", path)[2]
            assert (args.anneal_steps is not None) == bool(late)
        elif kind == "sft":
            parse(metamath_sft, "--config", path)
        elif kind in ("evaluate", "report"):
            flags = quantize_eval.QuantizeEvalParser().parse(["--config", str(path)])
            assert len(flags["runs"]) == (1 if kind == "evaluate" else len(experiment.runs("anneal")))
    names = [stage.name for stage in stages]
    assert "anneal/adamw" in names
    assert names[-1] == "report"
    wide = {stage.name.split("/")[0] for stage in stages if stage.wide}
    on_gpus = devices > 1 and file.stem != "toy"
    assert wide == ({"pretrain", "anneal"} & {name.split("/")[0] for name in names} if on_gpus else set())


def test_a_file_extends_another_and_flags_win(tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 1e-3\nseed: 3\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yaml").write_text("extends: ../base.yaml\nseed: 4\ntokenizer_name: ./here\n")
    argv = ["--config", str(tmp_path / "sub" / "own.yaml"), "--max_steps", "3", "--weight_decay", "0.5", "--dry_run"]
    model, _, args, *_ = olmo_mid_sam.make_parser().parse(argv)
    assert (args.learning_rate, args.seed, args.weight_decay) == (1e-3, 4, 0.5)
    assert model.tokenizer_name == str(tmp_path / "sub" / "here")
    (tmp_path / "last.yaml").write_text("seed: 5\n")
    argv[2:2] = [str(tmp_path / "last.yaml")]
    assert olmo_mid_sam.make_parser().parse(argv)[2].seed == 5
    assert olmo_mid_sam.make_parser().parse([*argv, "--seed", "6"])[2].seed == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sam_roh: 0.05\n", r"own.yaml sets 'sam_roh', which is no setting of olmo_mid_sam.py"),
        ("extends: missing.yaml\n", r"The config file .*missing.yaml cannot be read"),
        ("extends: own.yaml\n", "extends itself"),
        ("- a\n", "must hold a mapping"),
        ("a: [\n", "cannot be read"),
        ("sam_phase: annealing\n", "sam_phase: 'annealing' is none of all, anneal"),
        ("dataset_weights: [a, b]\n", r"dataset_weights: \['a', 'b'\] is no list of values"),
    ],
)
def test_wrong_files_are_told(tmp_path, content, message):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        olmo_mid_sam.make_parser().parse(["--config", str(tmp_path / "own.yaml"), "--max_steps", "1", "--dry_run"])


@pytest.mark.parametrize("recipe", [olmo_mid_sam, metamath_sft, quantize_eval, reproduce, toy_data])
def test_mistakes_are_told_in_a_line(recipe, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("- a\n")
    for argv, message in (
        (["--confg", "x"], "unrecognized argument --confg. Did you mean --config?"),
        (["--config"], "argument --config: expected"),
        (["--config", str(tmp_path / "none.yaml")], "none.yaml cannot be read: No such file"),
        (["--config", str(tmp_path / "own.yaml")], "own.yaml must hold a mapping"),
    ):
        assert recipe.main([*argv, "--dry_run"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{recipe.__name__}.py: ")
        assert message in line


def test_an_unknown_preset_is_told(tmp_path):
    with pytest.raises(ValueError, match="no preset '7b'; there are 150m, 20m"):
        reproduce.read_preset("7b")
    (tmp_path / "own.yaml").write_text("aneal: {}\n")
    with pytest.raises(ValueError, match="sets 'aneal'; a preset has"):
        reproduce.read_preset(str(tmp_path / "own.yaml"))
    with pytest.raises(ValueError, match="needs GPUs, and there are none"):
        reproduce.find_devices({"device": "gpu"}, 0)


def test_lists_of_one_flag_are_lists(tmp_path):
    (tmp_path / "own.yaml").write_text("no_weight_decay: embed_tokens\n")
    parser = olmo_mid_sam.make_parser()
    assert isinstance(parser, RecipeParser)
    args = parser.parse(["--config", str(tmp_path / "own.yaml"), "--max_steps", "1", "--dry_run"])[2]
    assert args.no_weight_decay == ["embed_tokens"]


ROOT = CONFIGS.parents[1]
SHOWN = [
    (page.name, recipe, flags)
    for page in (ROOT / "README.md", ROOT / "recipes" / "README.md")
    for recipe, flags in re.findall(r"recipes/(\w+)\.py (--[^`\n]*)", page.read_text())
]


@pytest.mark.parametrize(("page", "recipe", "flags"), SHOWN)
def test_commands_that_are_shown_are_understood(page, recipe, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = shlex.split(flags)
    if "..." in argv:
        return
    if recipe == "quantize_eval":
        assert len(quantize_eval.QuantizeEvalParser().parse(argv)["runs"]) == 2
    elif recipe == "reproduce":
        preset = reproduce.read_preset(argv[argv.index("--preset") + 1])
        assert reproduce.Experiment(preset, Path("outputs"), 8).stages()
    else:
        parse({"olmo_mid_sam": olmo_mid_sam, "metamath_sft": metamath_sft}[recipe], *argv)


def test_many_commands_are_shown():
    assert len(SHOWN) >= 14
    assert {recipe for _, recipe, _ in SHOWN} == {"olmo_mid_sam", "metamath_sft", "quantize_eval", "reproduce"}


def test_linked_files_of_the_tour_exist():
    page = (ROOT / "recipes" / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (ROOT / "recipes" / path).exists(), path
