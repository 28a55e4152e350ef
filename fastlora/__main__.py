import sys

from fastlora.commands.main import main

sys.exit(main())
