"""Looking after the ranks of a Slurm job: starts them, and starts them again where that can help."""
