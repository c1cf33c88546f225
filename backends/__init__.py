"""Child processes and everything peculiar to mlx_lm.server. Never imports ``gateway``."""
