"""``python -m tersor`` equals the command ``tersor``."""

from .cli import main

if __name__ == "__main__":
    main()
