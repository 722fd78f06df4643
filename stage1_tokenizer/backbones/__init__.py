"""The networks of an autoencoder: encoders and decoders."""
