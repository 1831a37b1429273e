"""The networks: encoder, autoencoder, classifier, and the table of their sizes."""
