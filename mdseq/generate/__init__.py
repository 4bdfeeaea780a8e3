"""From a trained denoiser to text."""
