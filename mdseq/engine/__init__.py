"""Hosting the objective by DeepSpeed. Only this package imports deepspeed."""
