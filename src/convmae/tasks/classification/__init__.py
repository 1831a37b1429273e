"""Classification: a class for an image, by a fine-tuned classifier or by a linear layer on a frozen encoder."""
