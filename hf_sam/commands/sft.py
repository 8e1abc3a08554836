"""`hf-sam sft`: TRL's SFT script with SAM, and with the dataset specs of the other commands."""

import datasets
import trl
import trl.scripts.sft
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..runtime.config import ConfigParser
from ..sft import SAMSFTConfig
from .help import group_sam_flags
from .launch import run_or_launch
from .script import load_script
from .training_inputs import SFT_COLUMNS, load_training_data, parse_arguments


def make_parser() -> ConfigParser:
    """Create the parser of the command, with TRL's arguments for data and model, and [`~hf_sam.SAMSFTConfig`]."""
    classes = (ScriptArguments, SAMSFTConfig, ModelConfig, DatasetMixtureConfig)
    return group_sam_flags(ConfigParser(classes, prog="hf-sam sft"))


def main(argv: list[str]) -> int:
    """Train, here or in launched processes; returns the exit status."""
    return run_or_launch("sft", make_parser(), argv, train)


def train(argv: list[str]) -> int:
    """Train in this process; returns the exit status."""
    script_args, args, model_args, mixture = parse_arguments(make_parser(), argv)
    data = load_training_data(script_args, args, mixture, [*SFT_COLUMNS, args.dataset_text_field])
    script_args.dataset_train_split, script_args.dataset_test_split = "train", "test"

    def loaded(*_, **__) -> dict:
        return data

    script = load_script(trl.scripts.sft.__file__, {datasets.load_dataset: loaded, trl.get_dataset: loaded})
    script.main(script_args, args, model_args, mixture)
    return 0
