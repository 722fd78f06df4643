"""What stands between encoder and decoder: continuous latents, and every quantizer."""
