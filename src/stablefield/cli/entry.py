"""The entry point: it finds the verb, runs it and reports failures.

The exit status is 0 for success, 1 for a failed run, 2 for wrong use, and 128 plus its number for a signal, as in shells. A
failure prints one paragraph on standard error, with a traceback only under --debug.
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
    """Run `main` as a program, and end the process.

    One of several processes ends by os._exit, after its threads and its atexit functions. An interpreter that shuts down
    while gloo's threads live can abort: a thread that drops its last tensors then waits for an interpreter that is gone.
    Those threads may outlive the group, since torch itself keeps groups alive (as default arguments of
    torch.distributed.nn.functional, which compilers import).

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

    It may leave its process group open; `program` ends that with the process.

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
    """Run the arguments; report most mistakes in them before importing torch."""
    found = answer(arguments)
    if found is not None and not _of_one_recipe(arguments):
        _print(found)
        return 0
    arguments = list(arguments) if found is not None else checked(arguments)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'the command needs {", ".join(missing)}, unlike the library: pip install "stablefield[train]".'
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
    """Whether the call asks for help that depends on the recipe."""
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
    """Let Ctrl-C end the process at once within this block, in which no work has begun.

    The modules of torch may turn a KeyboardInterrupt during their import into some other error.
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
    """Print an answer; ignore a closed pipe."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is sys.__stdout__:
            silence(1)
        if not isinstance(error, BrokenPipeError):
            raise OSError(f"cannot write the output: {error}") from error


def _after_printing(status: int) -> int:
    """Flush the output and return the status: 1 if that fails, unless the reader has closed the pipe."""
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
    _tell(f"cannot write the output: {failure}")
    return status or 1


@contextmanager
def _watched() -> Generator[None]:
    """For one of several processes: report long waits for the others, and end with the launcher."""
    if "RANK" not in os.environ:
        yield
        return
    from stablefield._wait_report import WaitReporter
    from stablefield.cli.interruption import end_with_launcher

    end_with_launcher()
    with WaitReporter(_tell):
        yield


def _is_message(error: Exception) -> bool:
    """Whether the error's message is for the user."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    loop = sys.modules.get("stablefield.training._loop")  # looked up, since its import may have failed
    return loop is not None and isinstance(error, loop.TrainingError)


def _in_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _among_others() -> bool:
    # A group's threads may outlive it.
    return _in_group() or ("torch.distributed" in sys.modules and os.environ.get("WORLD_SIZE", "1") != "1")


def _end(status: int) -> NoReturn:
    """End the process as the interpreter would, but without tearing the interpreter down."""
    try:
        # After a failure, do not destroy the group: NCCL would wait for ranks that may be dead.
        if status == 0 and _in_group():
            sys.modules["torch.distributed"].destroy_process_group()
        threading._shutdown()  # pyrefly: ignore[missing-attribute]
        atexit._run_exitfuncs()
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
                status = status or 120  # as in Python
        os._exit(status)


def _tell(message: str) -> None:
    # Do not wrap: a command in the message stays in one piece, and a terminal wraps by itself.
    if sys.stderr is not None:
        with suppress(OSError):
            # One write, which no other process's message can split.
            sys.stderr.write(f"stablefield: {clean(message)}\n")
