"""Images, masks, classes and the samples made of them."""
