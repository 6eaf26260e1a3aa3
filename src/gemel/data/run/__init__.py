"""Who does the tasks of a run: processes of this machine, members of a SLURM array, or a Ray cluster. They only hand tasks out."""
