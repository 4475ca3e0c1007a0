"""From a checked configuration to processes: one, ranks under torchrun, Slurm, sweeps, and who watches over them."""
