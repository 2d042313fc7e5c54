"""The mathematics of masked diffusion: pure tensor functions that know no model, no file and no configuration."""
