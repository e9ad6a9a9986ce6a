"""The wheel in empty environments of several versions of Python, torch and numpy; not a test, since torch is large.

    python tests/release/matrix.py "python3.11 torch==2.13.0" "python3.12 torch==2.11.0 numpy==1.26.4" ...

Each argument names an interpreter and what is installed before the wheel, which torch's CUDA builds make some gigabytes.
Runs `smoke.py` in each, and writes tests/release/matrix.json, which the documentation shows.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, build, create, smoke

RESULT = Path(__file__).with_name("matrix.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="+", metavar='"PYTHON PACKAGE..."')
    found: list[dict[str, str]] = []
    failed = False
    for environment in parser.parse_args().environments:
        python, *packages = environment.split()
        with tempfile.TemporaryDirectory() as folder:
            wheel = build(Path(folder))[1]
            try:
                found.append(smoke(create(Path(folder) / "venv", [*packages, str(wheel)], python)))
            except RuntimeError as error:
                failed = True
                print(f"{environment}: {error}", file=sys.stderr)
                continue
        print(found[-1])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # Those of earlier runs stay, but for what was run again.
    kept = {_key(one): one for one in (json.loads(RESULT.read_text()) if RESULT.exists() else [])}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    kept |= {_key(one): one | {"date": today, "commit": commit.strip()} for one in found}
    RESULT.write_text(json.dumps([kept[key] for key in sorted(kept)], indent=1) + "\n")
    sys.exit(failed)


def _key(versions: dict[str, str]) -> tuple[str, str, str]:
    return versions["python"], versions["torch"], versions["numpy"]


if __name__ == "__main__":
    main()
