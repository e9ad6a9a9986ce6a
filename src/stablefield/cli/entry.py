"""The entry point: which verb, and how a failure is told.

Exit status 0 for success, 1 for a run that failed, 2 for wrong use. A failure is one paragraph on standard error, without a
traceback unless --debug is given.
"""

import atexit
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["main", "program"]

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
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _tell(
            f'the command needs {", ".join(missing)}, which the library alone does not: pip install "stablefield[train]".'
        )
        sys.exit(1)
    try:
        # Within, since an interruption may come that early.
        from stablefield.cli.verbs import parse
        from stablefield.training.allocator import keep_freed_memory

        keep_freed_memory()
        status = parse(arguments).run()
    except KeyboardInterrupt:
        _tell("interrupted.")
        status = 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        if _is_message(error):
            _tell(str(error))
        else:
            _tell(f"{type(error).__name__}: {error}. This is a defect of ours; --debug shows where it happened.")
        status = 2 if isinstance(error, ValueError) else 1
    sys.exit(status)


@contextmanager
def _watched() -> Generator[None]:
    """For what one of several processes does: it tells long waits for the others, and ends with its launcher."""
    if "RANK" not in os.environ:
        yield
        return
    from stablefield.cli.interruption import end_with_launcher
    from stablefield.targets.watch import Watch

    end_with_launcher()
    with Watch(_tell):
        yield


def _is_message(error: Exception) -> bool:
    """Whether an error was made to be read."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    loop = sys.modules.get("stablefield.training.loop")  # looked up, since loading it may be what failed
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
        status = 1
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
        sys.stderr.write(f"stablefield: {message}\n")  # one write, which no other process's message can divide
