"""The networks: what describes an encoder, the encoder, what stands on it, and how weights are made to fit."""
