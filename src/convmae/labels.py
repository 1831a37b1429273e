"""The label of no class, one for all that deals with a class for each pixel: data, models, figures and pictures."""

IGNORED = 255
"""Label of pixels that count nowhere: nothing is learned from them, and they are not judged."""
