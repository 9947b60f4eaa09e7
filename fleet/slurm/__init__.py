"""Machines from Slurm: what an allocation grants a worker, how allocations are asked for, and how many."""
