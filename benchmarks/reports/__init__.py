"""Reports of results: Markdown, pictures, comparisons, targets."""
