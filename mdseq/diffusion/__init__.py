"""The diffusion of embeddings: noise, timesteps, soft absorbing state, objective and solvers."""
