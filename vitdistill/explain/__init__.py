"""Before it runs: what a run will compute and cost."""
