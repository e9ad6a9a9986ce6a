"""The entry point: which verb, and how a failure is told.

Exit status 0 for success, 1 for a run that failed, 2 for wrong use. A failure is one paragraph on standard error, without a
traceback unless --debug is given.
"""

import atexit
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

__all__ = ["main", "program"]

_NEEDED = ("tyro", "rich", "PIL", "safetensors", "accelerate")


def program() -> None:
    """The command as a program of its own: `main`, and the end of the process."""
    try:
        main()
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _end_among_others(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status."""
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


def _is_message(error: Exception) -> bool:
    """Whether an error was made to be read."""
    if isinstance(error, ValueError | OSError | ImportError):
        return True
    loop = sys.modules.get("stablefield.training.loop")  # looked up, since loading it may be what failed
    return loop is not None and isinstance(error, loop.TrainingError)


def _end_among_others(status: int) -> None:
    """End this process here and now, after what is to end in order.

    An interpreter that is torn down while gloo's threads live can abort: a thread that drops its last tensors then waits for
    an interpreter that is gone. Those threads may outlive the group's end, since torch itself keeps groups alive (as default
    arguments of torch.distributed.nn.functional, which compilers import).
    """
    distributed = sys.modules.get("torch.distributed")
    # After a failure there is nothing to end in order: NCCL would wait for ranks that may be dead.
    if status == 0:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _tell(message: str) -> None:
    # Not wrapped: a command in the message stays in one piece, and a terminal wraps by itself.
    # In one write, so that the messages of several processes stay whole.
    sys.stderr.write(f"stablefield: {message}\n")
