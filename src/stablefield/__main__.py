"""`python -m stablefield`: the command, for launchers that start modules, such as torchrun."""

from stablefield.cli.entry import program

__all__: list[str] = []

if __name__ == "__main__":
    program()
