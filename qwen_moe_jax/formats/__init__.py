"""How matrices and caches are held in memory: what kernels and model both build on."""
