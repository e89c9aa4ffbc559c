"""The command ``tersor``; ``python -m tersor`` is the same."""


def main() -> None:
    """Run the command line."""
    from .app import app

    app(prog_name="tersor")
