"""Cross-validation: every image is scored once by a model that was not trained on it."""
