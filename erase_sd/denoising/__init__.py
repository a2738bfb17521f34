"""denoising."""
