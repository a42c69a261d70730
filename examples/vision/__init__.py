"""What the examples on the paper's image data share: files, metrics, networks, methods and the training loop."""
