"""Files that survive: atomic writes, manifests, logs, locks and checkpoints."""
