"""Everything that needs both stages or a trained model: encode, generate, reconstruct, inspect, the command line."""
