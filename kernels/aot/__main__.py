"""``python -m fastlora.kernels.aot``."""

import sys

from fastlora.kernels.aot.run import main

if __name__ == "__main__":
    sys.exit(main())
