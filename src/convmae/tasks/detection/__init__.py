"""Detection: objects with their boxes and masks, by a Mask R-CNN on images annotated in COCO's format."""
