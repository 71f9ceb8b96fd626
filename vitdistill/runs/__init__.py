"""Do it: prepare, train, label, resume."""
