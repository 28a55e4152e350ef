"""``fastlora tune``: the fastest config of each kernel on this GPU."""
