"""What can be told of a model and its layers without changing them."""
