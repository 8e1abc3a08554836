"""Plumbing that does not depend on SAM: processes, shards, models, datasets, configs, records, disk."""
