"""What is measured: each suite's operands, providers, truth and cost."""
