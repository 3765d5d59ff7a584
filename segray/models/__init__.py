"""Networks: architectures by name, and what is made of their logits."""
