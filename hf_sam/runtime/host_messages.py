"""Messages of the host libraries that tell a user nothing, and the filters that keep exactly these away.

Each entry says why nobody can act on it. Every other message of the same library still gets through.
"""

import logging
import warnings

# Logger, and how its message begins.
_LOG_MESSAGES = (
    # bitsandbytes at import, on CPUs with AVX512-BF16: an optional kernel is missing, and the plain one takes over.
    # transformers imports bitsandbytes through PEFT, so this is the first line of any command, quantized or not.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    # bitsandbytes in every forward pass of every layer: what LLM.int8() is, and not a setting of the user.
    ("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from"),
)

# How a message begins, its category, and the module that warns.
_WARNINGS = (
    # The default of TRL's configs; a user who never named the flag cannot rename it.
    ("`gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.training_args"),
    # PEFT and TRL read the old name of a property of the model.
    ("`is_gradient_checkpointing` is deprecated", FutureWarning, r"transformers\.modeling_utils"),
)


class _Beginnings(logging.Filter):
    """Drops the records whose message begins in one of some ways."""

    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self._beginnings)


def _filter_log_messages() -> None:
    for name in {name for name, _ in _LOG_MESSAGES}:
        logging.getLogger(name).addFilter(_Beginnings(tuple(text for one, text in _LOG_MESSAGES if one == name)))


def filter_warnings() -> None:
    """Ignore the warnings that libraries raise about each other; for commands, since it changes the whole process."""
    for message, category, module in _WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)


# By being imported: the messages come while other modules are.
_filter_log_messages()
