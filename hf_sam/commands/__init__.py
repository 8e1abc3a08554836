"""The command `hf-sam`, one module a sub-command."""
