"""The label of tokens that no loss counts: the default `ignore_index` of torch's cross-entropy."""

IGNORE_INDEX = -100
