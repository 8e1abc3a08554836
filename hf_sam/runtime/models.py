"""Find, check and load the models that a command line names, on disk or on the Hub."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .dataset_specs import parse_spec
from .disk import check_disk
from .distributed import compute_on_first, rank_and_world
from .fingerprint import fingerprint, fingerprint_of_files
from .packages import require
from .weight_files import check_finite, check_weights

_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_CONFIGS = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class LocalModel:
    """A model or an adapter in a local folder.

    Attributes:
        name (`str`): name in reports.
        spec (`str`): folder or Hub id that the user gave.
        folder (`Path`): folder of its files.
        base (`LocalModel` or `None`): for an adapter, its base model.
        fingerprint (`str`): fingerprint of its weights, for an adapter together with those of its base model.
    """

    name: str
    spec: str
    folder: Path
    base: "LocalModel | None"
    fingerprint: str

    def load(self, dtype: torch.dtype, device_map="cpu") -> torch.nn.Module:
        """Load the model in evaluation mode; an adapter is merged into its base model.

        Raises:
            FloatingPointError: if a weight is NaN or infinite.
        """
        if self.base is None:
            model = load_checked(self.folder, dtype=dtype, device_map=device_map)
        else:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(self.base.load(dtype, device_map), self.folder)
            model = adapted.merge_and_unload()
        check_finite(model, self.name)
        return model.eval()

    def check_length(self, max_length: int) -> None:
        """Raises ValueError if the context of the model is shorter than `max_length` tokens."""
        if self.base is not None:
            self.base.check_length(max_length)
            return
        config = AutoConfig.from_pretrained(self.folder).get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and max_length > longest:
            raise ValueError(
                f"{self.spec!r} takes {longest} tokens at most, but rows have up to {max_length}. Set "
                f"--max_length {longest}."
            )

    def vocabulary(self) -> int:
        """Size of the vocabulary in the config."""
        if self.base is not None:
            return self.base.vocabulary()
        return AutoConfig.from_pretrained(self.folder).get_text_config().vocab_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights, read from the safetensors headers; for an adapter those of its base model."""
        from safetensors import safe_open

        shapes = {}
        for path in sorted((self.base or self).folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes

    def check_space(self, dtype: torch.dtype) -> None:
        """Raises OSError if the disk has no space for merged copies, one per process; adapters are quantized merged."""
        size = sum(math.prod(shape) for shape in self.shapes().values()) * dtype.itemsize * rank_and_world()[1]
        check_disk(tempfile.gettempdir(), size, f"the merged copy of {self.spec!r} (set TMPDIR to another disk)")

    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer: vocabulary and chat template."""
        tokenizer = self.tokenizer()
        return fingerprint([tokenizer.get_vocab(), str(tokenizer.chat_template)])

    def tokenizer(self):
        """Load the tokenizer; an adapter without one uses that of its base model.

        Raises:
            ValueError: if there is no tokenizer.
        """
        has_one = any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
        if not has_one and self.base is not None:
            return self.base.tokenizer()
        if not has_one:
            raise ValueError(
                f"{self.spec!r} has no tokenizer. Save one into its folder: tokenizer.save_pretrained(...)."
            )
        return AutoTokenizer.from_pretrained(self.folder)


def find_model(spec: str) -> LocalModel:
    """Find the model `[NAME=]FOLDER` or `[NAME=]HUB/ID[@REVISION]`; a Hub model is downloaded if it is not cached.

    Raises:
        ValueError: if the model or the revision does not exist, or its files are damaged.
        OSError: if the download fails, or the disk has no space for it.
    """
    name, place = parse_spec(spec)
    folder = Path(place) if os.path.isdir(place) else _download(place)
    if (folder / "adapter_config.json").exists():
        require("peft", f"The adapter {place!r}")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        under = config.get("base_model_name_or_path") or ""
        revision = config.get("revision")
        try:
            base = find_model(f"{under}@{revision}" if revision and not os.path.isdir(under) else under)
        except (ValueError, OSError) as error:
            raise ValueError(f"The adapter {place!r} belongs to {under!r}, which was not found: {error}") from error
    elif (folder / "config.json").exists():
        base = None
    else:
        raise ValueError(f"{place!r} holds neither config.json nor adapter_config.json: it is not a model.")
    check_weights(folder)
    weights = compute_on_first(lambda: _fingerprint_of_weights(folder))
    if base is not None:
        weights = fingerprint(f"{weights} on {base.fingerprint}")
    return LocalModel(name, place, folder, base, weights)


def check_model(place: str, revision: str | None = None, weights: bool = True) -> None:
    """Check that the model to train exists, without loading or downloading its weights.

    Args:
        place (`str`): a folder, or a Hub id.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        weights (`bool`, defaults to `True`): check the weight files of a folder, too.

    Raises:
        ValueError: if the model does not exist, or a weight file is damaged.
    """
    if os.path.isdir(place):
        if not any((Path(place) / name).exists() for name in _CONFIGS):
            raise ValueError(f"{place!r} holds neither config.json nor adapter_config.json: it is not a model.")
        if weights:
            check_weights(Path(place))
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(place, place, revision):
        try:
            hf_hub_download(place, _CONFIGS[0], revision=revision)
        except LocalEntryNotFoundError:  # subclass of EntryNotFoundError: not cached, and the Hub cannot be reached
            raise
        except EntryNotFoundError:
            hf_hub_download(place, _CONFIGS[1], revision=revision)


def check_same_tokens(base, tuned, name: str) -> None:
    """Raises ValueError if two tokenizers map the tokens of the base to different ids.

    Tokens added by fine-tuning (chat markers, padding) are allowed.
    """
    known, other = base.get_vocab(), tuned.get_vocab()
    different = [token for token, number in known.items() if other.get(token) != number]
    if different:
        raise ValueError(
            f"The tokenizers of the base and of {name!r} differ: {len(different)} of {len(known)} tokens of the base, "
            f"such as {different[0]!r}, have another id or none. Losses per token of the two cannot be compared."
        )


def model_without_weights(path: str | Path, **kwargs) -> torch.nn.Module:
    """The unquantized causal language model of a config, on the meta device, e.g. for names and sizes of its weights.

    Args:
        path (`str` or `Path`): folder or hub id.
        kwargs: further arguments of `AutoConfig.from_pretrained`, e.g. `revision`.
    """
    config = AutoConfig.from_pretrained(path, **kwargs)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_checked(path: str | Path, **kwargs) -> torch.nn.Module:
    """`AutoModelForCausalLM.from_pretrained` that raises for missing weights instead of initializing them randomly.

    Raises:
        ValueError: if weights are missing, or their shapes do not match the config.
    """
    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    wrong = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{str(path)!r} lacks {len(wrong)} of the weights of {type(model).__name__}, such as {wrong[0]!r}, or has "
            "them in another shape. They would be initialized randomly. Check how the model was saved."
        )
    return model


def _download(place: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    repo, _, revision = place.partition("@")
    with hub_errors(place, repo, revision or None):
        wanted = list(_WANTED)
        if not HF_HUB_OFFLINE and (files := _files_on_hub(repo, revision or None)):
            if not any(file.rfilename.endswith(".safetensors") for file in files):
                wanted.append("*.bin")
            cached = {path.name for path in Path(HF_HUB_CACHE).glob(f"models--{repo.replace('/', '--')}/blobs/*")}
            top = [file for file in files if file.lfs and "/" not in file.rfilename]
            weights = [file for file in top if any(fnmatch(file.rfilename, name) for name in wanted)]
            missing = sum(file.size or 0 for file in weights if file.lfs.sha256 not in cached)
            check_disk(HF_HUB_CACHE, missing, f"the download of {place!r} (set HF_HOME to another disk)")
        ignored = ["*/*", "consolidated*"]  # other checkpoints, and the same weights in other formats
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted, ignore_patterns=ignored))


@contextlib.contextmanager
def hub_errors(place: str, repo: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub into ValueErrors that say what does not exist or cannot be reached."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if repo.count("/") > 1 or place.startswith((".", "~", "/")):
        raise ValueError(f"There is no folder {place!r}.")
    try:
        yield
    except RevisionNotFoundError as error:
        raise ValueError(f"The model {repo!r} has no revision {revision!r} on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no folder {place!r}, and no model {repo!r} on the Hub that you may read."
        ) from error
    except HFValidationError as error:
        raise ValueError(f"There is no folder {place!r}, and it is not a Hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ValueError(
            f"There is no folder {place!r}, and the model {repo!r}{at} is not in the local cache; the Hub cannot be "
            "reached, or HF_HUB_OFFLINE is set."
        ) from error


def _files_on_hub(repo: str, revision: str | None) -> list:
    """Files of the repository; empty if the Hub cannot be reached (the model may still be cached)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # no network; the exception type depends on the HTTP library
        return []


def _fingerprint_of_weights(folder: Path) -> str:
    files = [*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("*_model*.bin")]
    if not any(file.suffix in (".safetensors", ".bin") for file in files):
        raise ValueError(f"{str(folder)!r} holds no weights (*.safetensors).")
    return fingerprint_of_files(files, folder)
