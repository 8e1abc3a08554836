"""Label of tokens that the loss ignores: the default `ignore_index` of torch's cross-entropy."""

IGNORE_INDEX = -100
