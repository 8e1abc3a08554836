"""Filters for messages of other libraries that users cannot act on.

Each entry gives the reason. All other messages of the same library pass.
"""

import logging
import warnings

# Logger, and the first words of its message.
_LOG_MESSAGES = (
    # bitsandbytes, at import on CPUs with AVX512-BF16: an optional kernel is missing and a fallback is used.
    # transformers imports bitsandbytes through PEFT, so every command would begin with this line.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    # bitsandbytes, in every forward pass of every layer: this is how LLM.int8() works; no setting changes it.
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from"),
    # torchao, at import where its kernels for GPUs do not load; it works without them. PEFT imports it if installed.
    ("torchao", "Failed to load"),
    ("torchao", "Skipping import of cpp extensions"),
    # torchao, at import: how it registers its own constants.
    ("torch.utils._pytree", "%s is an Enum subclass"),
)

# First words of a warning, its category, and the module that raises it.
_WARNINGS = (
    # TRL's configs set this flag by default; users have not set it themselves.
    ("`gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.training_args"),
    # PEFT and TRL read a model property by its old name.
    ("`is_gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.modeling_utils"),
)


class _Beginnings(logging.Filter):
    """Drops records whose message starts with one of the given beginnings."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginnings)


def _filter_log_messages() -> None:
    for name in {name for name, _ in _LOG_MESSAGES}:
        logging.getLogger(name).addFilter(_Beginnings(tuple(text for one, text in _LOG_MESSAGES if one == name)))


def filter_warnings() -> None:
    """Ignore warnings that libraries raise about each other. Only for commands: it affects the whole process."""
    for message, category, module in _WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)


# At import time, because the messages appear while other modules are imported.
_filter_log_messages()
