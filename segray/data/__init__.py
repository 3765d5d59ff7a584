"""Images, masks, classes, and labelled samples."""
