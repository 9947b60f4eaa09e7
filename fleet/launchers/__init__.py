"""The ways in which a fleet gets its machines: SSH, this machine; later Slurm, Kubernetes."""
