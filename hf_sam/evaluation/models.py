"""The models of an evaluation, loaded on first use in each variant, and released."""

import contextlib
import gc
from collections.abc import Iterator

import torch

from ..baselines.wise_ft import wise_ft
from ..instruments import HeldOutData
from ..quantizers import QUANTIZERS, Quantized, load_ready_made, quantized
from ..quantizers.loading import load_source_quantized
from ..quantizers.ready_made import ReadyMade
from ..runtime.distributed import default_device
from ..runtime.models import LocalModel

# A model, and what it was quantized to.
Variant = tuple[torch.nn.Module, Quantized | None]


class Models:
    """Loads models and keeps them until they are released.

    Args:
        dtype (`torch.dtype`): in which they are loaded.
        device (`str`): where; "auto" spreads each over all devices; empty takes the device of this process.
    """

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype = dtype
        try:
            self.device_map = "auto" if device == "auto" else {"": torch.device(device) if device else default_device()}
        except RuntimeError as error:
            raise ValueError(f"--device {device} is not a device of torch, e.g. cpu or cuda:0, nor auto.") from error
        self._loaded: dict[str, torch.nn.Module] = {}

    def get(self, source: LocalModel) -> torch.nn.Module:
        """The model in full precision."""
        if source.name not in self._loaded:
            self._loaded[source.name] = source.load(self.dtype, self.device_map)
        return self._loaded[source.name]

    def on_host(self, source: LocalModel) -> torch.nn.Module:
        """The model on the CPU, if only its weights are needed."""
        if self.device_map == {"": torch.device("cpu")}:
            return self.get(source)
        self._loaded.pop(source.name, None)
        return source.load(self.dtype, "cpu")

    @contextlib.contextmanager
    def plain(self, source: LocalModel) -> Iterator[Variant]:
        """The model, unchanged."""
        yield self.get(source), None

    @contextlib.contextmanager
    def interpolated(self, base: LocalModel, source: LocalModel, alpha: float) -> Iterator[Variant]:
        """The interpolation between the base and the model (Wise-FT)."""
        with contextlib.closing(wise_ft(self.get(base), self.on_host(source), [alpha])) as sweep:
            yield next(sweep)[1], None

    @contextlib.contextmanager
    def quantized(self, source: LocalModel, scheme: str, calibration: HeldOutData | None = None) -> Iterator[Variant]:
        """The quantized model."""
        if QUANTIZERS[scheme].simulated:
            self.release(but=source)
            with quantized(self.get(source), scheme) as variant:
                yield variant
            return
        self.release()
        yield load_source_quantized(source, scheme, self.dtype, self.device_map, calibration)

    @contextlib.contextmanager
    def ready_made(self, made: ReadyMade) -> Iterator[Variant]:
        """A model that somebody else quantized."""
        self.release()
        yield load_ready_made(made, self.dtype, self.device_map)

    @contextlib.contextmanager
    def kept_inside(self) -> Iterator[None]:
        """Context manager: keeps loaded models, and releases all at the end."""
        try:
            yield
        finally:
            self.release()

    def release(self, but: LocalModel | None = None) -> None:
        """Release all models, or all but one."""
        self._loaded = {name: model for name, model in self._loaded.items() if but is not None and name == but.name}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
