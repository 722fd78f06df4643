"""The terms of an autoencoder's loss."""
