"""Who fastlora is measured beside: libraries imported where installed, and the compiler."""
