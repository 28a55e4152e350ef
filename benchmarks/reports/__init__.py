"""What is made of results: Markdown, pictures, CSV, comparisons, targets."""
