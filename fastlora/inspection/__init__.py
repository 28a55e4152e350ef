"""Facts about a model and its layers, found without changing them."""
