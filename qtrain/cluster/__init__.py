"""What knows the batch system (SLURM): which job this process is of, and what the queue says. The standard library alone."""
