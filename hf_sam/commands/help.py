"""The SAM flags in the help of a command."""


def group_sam_flags(parser):
    """Move the fields of [`~hf_sam.SAMArguments`] to separate groups in the `--help` of an argparse parser.

    Args:
        parser (`argparse.ArgumentParser`): e.g. an `HfArgumentParser`; changed in place and returned.
    """
    from ..arguments import SAMArguments

    groups = {
        "sam_": parser.add_argument_group("sharpness-aware training"),
        "anneal_": parser.add_argument_group("shortened annealing"),
    }
    for source in parser._action_groups[:-2]:
        for action in [action for action in source._group_actions if action.dest in SAMArguments.__dataclass_fields__]:
            source._group_actions.remove(action)
            groups["sam_" if action.dest.startswith("sam_") else "anneal_"]._group_actions.append(action)
    return parser
