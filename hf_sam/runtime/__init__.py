"""Plumbing that knows nothing of SAM: processes, shards, models, datasets, configs, records, disk."""
