"""Whether an evaluation may continue in the folder of a finished one: it may add to it, but not replace it."""

from pathlib import Path
from types import SimpleNamespace

from ..instruments import INSTRUMENTS
from ..instruments.registry import groups
from ..quantizers import QUANTIZERS
from .results import Results


def check_same_evaluation(folder: str | Path, now: dict) -> None:
    """Check that a new record would contain everything of the finished one in a folder.

    That is so for the same evaluation, also with more models, data or instruments. An interrupted evaluation has no
    record, so any evaluation may use its folder.

    Args:
        folder (`str` or `Path`): output folder of the new evaluation.
        now (`dict`): its record, of which the parts need not be measured yet.

    Raises:
        ValueError: if the folder holds another evaluation; the message says what differs.
    """
    if not (Path(folder) / "results.json").exists():
        return
    remedy = "Choose another --output, or replace it with --overwrite."
    try:
        before = Results.read(folder).record
        changed = differences(before, now)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{str(folder)!r} holds a results.json that is not a record of an evaluation. {remedy}"
        ) from error
    if changed:
        raise ValueError(f"{str(folder)!r} holds another evaluation ({'; '.join(changed)}). {remedy}")


def differences(before: dict, now: dict) -> list[str]:
    """What the record `now` leaves out of the record `before` or measures differently, in words."""
    found = []
    if before["name"] != now["name"]:
        found.append(f"its name is {before['name']!r}, not {now['name']!r}")
    if before["models"][0]["name"] != now["models"][0]["name"]:
        found.append(f"its base is {before['models'][0]['name']!r}, not {now['models'][0]['name']!r}")
    found += _changed("model", before["models"], now["models"], "weights")
    found += _changed("data", before["data"], now["data"], "tokens")
    calibrated = [scheme for scheme in before["settings"]["quantize"] if QUANTIZERS[scheme].calibrated]
    if calibrated and before["calibration"] != now["calibration"]:
        found.append(f"{calibrated[0]} was calibrated on other data")
    for one in before["quantized"]:
        label = f"{one['model']}/{one['scheme']}"
        same = [o for o in now["quantized"] if (o["model"], o["scheme"]) == (one["model"], one["scheme"])]
        if not same:
            found.append(f"its quantized model {label!r} is left out")
        elif same[0]["fingerprint"] != one["fingerprint"]:
            found.append(f"its quantized model {label!r} had other weights")
    for role in ("old", "task"):
        first, other = ([d["name"] for d in record["data"] if d["role"] == role][:1] for record in (before, now))
        if first and first != other and other:
            found.append(f"its first {role} data is {first[0]!r}, not {other[0]!r}")
    return found + _changed_measures(before, now)


def _changed(kind: str, before: list[dict], now: list[dict], content: str) -> list[str]:
    prints = {one["name"]: one["fingerprint"] for one in now}
    left_out = [one["name"] for one in before if one["name"] not in prints]
    other = [one["name"] for one in before if prints.get(one["name"], one["fingerprint"]) != one["fingerprint"]]
    return [f"its {kind} {name!r} is left out" for name in left_out] + [
        f"its {kind} {name!r} had other {content}" for name in other
    ]


def _changed_measures(before: dict, now: dict) -> list[str]:
    old, new = before["settings"], now["settings"]
    found, decisive = [], ["dtype"]
    for flag in ("quantize", "wise_ft", "benchmarks", *groups()):
        found += [f"--{flag} {value} is left out" for value in old.get(flag, []) if value not in new[flag]]
    # Of instruments that are not registered now.
    found += [f"--{flag} {value} is left out" for flag in old.keys() - new.keys() for value in _list(old[flag])]
    for instrument in INSTRUMENTS.values():
        if instrument.is_selected(SimpleNamespace(**_with_all_instruments(old))):
            # Which tasks were run is in the lists above.
            decisive += [name for name in instrument.setting_names if name != "benchmarks"]
    for name in dict.fromkeys(decisive):
        if old.get(name) != new[name]:
            found.append(f"it has --{name} {old.get(name)}, not {new[name]}")
    for name, facts in before["facts"].items():
        for fact, value in facts.items():
            if name in now["facts"] and now["facts"][name].get(fact) != value:
                found.append(f"{fact.replace('_', ' ')} of its {name} is another one")
    triples = [[model["name"] for model in record["models"][1:3]] for record in (before, now)]
    measured = [i.name for i in INSTRUMENTS.values() if i.subject == "triple" and i.name in old.get(i.group, [])]
    if measured and triples[0] != triples[1]:
        found.append(f"its {measured[0]} goes through {', '.join(triples[0])}")
    return found


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _with_all_instruments(settings: dict) -> dict:
    """Settings of a record, completed by defaults where an instrument was registered later."""
    defaults = {setting.name: setting.default for one in INSTRUMENTS.values() for setting in one.settings}
    return {**defaults, **{name: [] for name in groups()}, **settings}
