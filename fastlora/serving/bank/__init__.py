"""The adapters of a server: on the device, in memory or on disk."""
