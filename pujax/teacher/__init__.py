"""The black box and what it answered; no jax."""
