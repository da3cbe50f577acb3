"""crystal_hpc: multi-phase pretraining of language models on preemptible Slurm clusters, provable afterwards."""

__version__ = "0.1.0"
