"""The label of tokens that no loss counts, as torch and transformers have it."""

IGNORED = -100
