"""The ops of torch.ops.fastlora, and the choice of the backend that runs each call."""
