"""Segmentation: a class for each pixel, by an UperNet on images with label maps."""
