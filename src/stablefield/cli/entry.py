"""The entry point: which verb, and how a failure is told.

Exit status 0 for success, 1 for a run that failed, 2 for wrong use; after a signal 128 and its number, as shells have it. A
failure is one paragraph on standard error, without a traceback unless --debug is given.
"""

import atexit
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import FrameType
from typing import NoReturn

from stablefield.cli.mistakes import checked
from stablefield.cli.terminal import clean, open_closed_streams, silence, take_every_character
from stablefield.cli.usage import answer, as_flags

__all__ = ["main", "program"]

_INTERRUPTED = 128 + signal.SIGINT
_NEEDED = ("tyro", "rich", "PIL", "safetensors", "accelerate")


def program() -> None:
    """Run `main` as a program of its own, and end the process.

    One of several processes ends by os._exit, once its threads are through and what is registered with atexit has run. An
    interpreter that is torn down while gloo's threads live can abort: a thread that drops its last tensors then waits for an
    interpreter that is gone. Those threads may outlive the group's end, since torch itself keeps groups alive (as default
    arguments of torch.distributed.nn.functional, which compilers import).

    Raises:
        SystemExit: with the status, if this process is alone.
    """
    open_closed_streams()
    try:
        with _watched():
            main()
    except SystemExit as end:
        if not _among_others():
            raise
        if isinstance(end.code, str):
            _tell(end.code)
        _end(end.code if isinstance(end.code, int) else int(end.code is not None))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    A process group that it has begun may be left open; `program` ends it with the process.

    Raises:
        SystemExit: with the exit status, always.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    take_every_character()
    try:
        status = _run(arguments)
    except KeyboardInterrupt:
        _tell("interrupted.")
        status = _INTERRUPTED
    except Exception as error:
        if debug and sys.stderr is not None:
            sys.stderr.write(clean(traceback.format_exc()))
        if _is_message(error):
            _tell(as_flags(str(error), verb=arguments[0] if arguments else ""))
        else:
            _tell(f"{type(error).__name__}: {error}. This is a bug in stablefield; rerun with --debug for a traceback.")
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(_after_printing(status))


def _run(arguments: Sequence[str]) -> int:
    """Do what the arguments ask for; most of what is wrong with them is told before torch is imported."""
    found = answer(arguments)
    if found is not None and not _of_one_recipe(arguments):
        _print(found)
        return 0
    arguments = list(arguments) if found is not None else checked(arguments)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'the command needs {", ".join(missing)}, which the library alone does not: pip install "stablefield[train]".'
        )
    with _ended_by_ctrl_c():
        from stablefield.cli.verbs import parse
        from stablefield.training._allocator import keep_freed_memory
    if found is not None:
        _print(_help_of_recipe(arguments))
        return 0
    keep_freed_memory()
    return parse(arguments).run()


def _of_one_recipe(arguments: Sequence[str]) -> bool:
    """Whether help is asked for that depends on the recipe."""
    named = any(argument == "--recipe" or argument.startswith("--recipe=") for argument in arguments)
    return arguments[:1] in (["train"], ["compare"]) and (named or "digits" in arguments)


def _help_of_recipe(arguments: Sequence[str]) -> str:
    from stablefield.cli.inventory import inventory
    from stablefield.cli.recipe_flags import base_of
    from stablefield.cli.usage import usage

    named = [
        word.partition("=")[2] or after for word, after in pairwise([*arguments, ""]) if word.startswith("--recipe")
    ]
    base = base_of(named[0] if named else "auto", "digits" if "digits" in arguments else "")
    return usage(inventory(base)[arguments[0]])


@contextmanager
def _ended_by_ctrl_c() -> Generator[None]:
    """For a block in which Ctrl-C ends the process at once, where nothing is under way yet.

    An exception in the midst of torch's import comes out as whatever the module makes of it.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        _tell("interrupted.")
        os._exit(_INTERRUPTED)

    usual = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if usual:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _print(text: str) -> None:
    """Print an answer; a reader who has left needs none."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is sys.__stdout__:
            silence(1)
        if not isinstance(error, BrokenPipeError):
            raise OSError(f"what was printed could not be written: {error}") from error


def _after_printing(status: int) -> int:
    """The status once what was printed is written: 1 if it cannot be, though in silence if its reader has left."""
    module = sys.modules.get("stablefield.cli.console")
    failure = None if module is None else module.console.failure
    if module is not None:
        module.console.failure = None
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        failure = error
        if sys.stdout is sys.__stdout__:
            silence(1)
    if failure is None or isinstance(failure, BrokenPipeError):
        return status
    _tell(f"what was printed could not be written: {failure}")
    return status or 1


@contextmanager
def _watched() -> Generator[None]:
    """For what one of several processes does: it tells long waits for the others, and ends with its launcher."""
    if "RANK" not in os.environ:
        yield
        return
    from stablefield._wait_report import WaitReporter
    from stablefield.cli.interruption import end_with_launcher

    end_with_launcher()
    with WaitReporter(_tell):
        yield


def _is_message(error: Exception) -> bool:
    """Whether an error was made to be read."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    loop = sys.modules.get("stablefield.training._loop")  # looked up, since loading it may be what failed
    return loop is not None and isinstance(error, loop.TrainingError)


def _in_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _among_others() -> bool:
    # A group that has been left may have left its threads.
    return _in_group() or ("torch.distributed" in sys.modules and os.environ.get("WORLD_SIZE", "1") != "1")


def _end(status: int) -> NoReturn:
    """Do what an interpreter does at its end, short of taking itself apart."""
    try:
        # After a failure the group is left as it is: NCCL would wait for ranks that may be dead.
        if status == 0 and _in_group():
            sys.modules["torch.distributed"].destroy_process_group()
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    except KeyboardInterrupt:
        _tell("interrupted.")
        status = _INTERRUPTED
    except Exception as error:
        _tell(f"at its end: {type(error).__name__}: {error}")
        status = status or 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                status = status or 120  # as Python has it
        os._exit(status)


def _tell(message: str) -> None:
    # Not wrapped: a command in the message stays in one piece, and a terminal wraps by itself.
    if sys.stderr is not None:
        with suppress(OSError):
            # One write, which no other process's message can divide.
            sys.stderr.write(f"stablefield: {clean(message)}\n")
