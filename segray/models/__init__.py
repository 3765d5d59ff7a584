"""Network architectures, losses, prediction from logits, model bundles and their export."""
