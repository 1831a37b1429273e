"""Where images come from: sources, decoding, augmentation and the order in which training sees them."""
