"""Configuration: floor 0, free of jax."""
