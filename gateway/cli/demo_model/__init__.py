"""Everything that ``mlx-gateway demo`` needs and the gateway itself does not."""
