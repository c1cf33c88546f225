"""The demo model: used by ``mlx-gateway demo`` and the shipped config, not by the gateway itself."""
