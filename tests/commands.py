"""The command in this process."""

import pytest

from stablefield.cli.entry import main


def status(*arguments: object) -> int:
    """Run the command, and return its exit status."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    code = exit_.value.code
    assert isinstance(code, int)
    return code
