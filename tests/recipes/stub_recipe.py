"""A recipe that trains nothing: it owns its directory, writes metrics, checkpoints and its end, and imports little.

    python stub_recipe.py env=... seed=... total_frames=N hydra.run.dir=DIR | resume=DIR

``fail=TEXT`` ends it with a line, ``hold=FILE`` keeps it at half its frames until there is a file, and ``kill=NAME``
has it send itself a signal there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

STEP = 10


def main() -> int:
    given = {key: value.strip("'") for key, _, value in (word.partition("=") for word in sys.argv[1:])}
    resumes = "resume" in given
    run = Path(given["resume"] if resumes else given["hydra.run.dir"])
    lock = FileLock(run / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        print(f"error: hydra.run.dir={run}: another process uses it", file=sys.stderr)
        return 2
    kept = run / "config.yaml"
    config = json.loads(kept.read_text()) if resumes else {"recipe": "stub", **given}
    config.update({key: given[key] for key in ("total_frames", "hold", "kill", "fail") if resumes and key in given})
    if not resumes and kept.exists():
        print("error: must be a directory without a run", file=sys.stderr)
        return 2
    kept.write_text(json.dumps(config))
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        if stopped:
            os._exit(70)  # twice: at once
        stopped.append(number)
        os.write(2, b"\nstopping: this batch is finished\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    total = int(config["total_frames"])
    checkpoints = run / "checkpoints"
    done = sorted(int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*"))
    frames = done[-1] if resumes and done else 0
    metrics = run / "metrics.csv"
    rows = metrics.read_text().splitlines()[1:] if resumes and metrics.exists() else []
    rows = [row for row in rows if int(row.split(",")[0]) <= frames]
    while frames < total and not stopped:
        if frames >= total // 2:
            if "fail" in config:
                print(f"error: {config['fail']}", file=sys.stderr)
                return int(config.get("status", 1))
            if config.get("kill"):
                signal.raise_signal(getattr(signal, config["kill"]))
            while "hold" in config and not Path(config["hold"]).exists() and not stopped:
                time.sleep(0.01)
        frames += STEP
        rows.append(f"{frames},1.5,{int(config.get('seed', 0)) + frames}")
        metrics.write_text("\n".join(["frames,wall_seconds,return_mean", *rows, ""]))
        (checkpoints / f"checkpoint-{frames:012d}").mkdir(parents=True)
    lock.release()
    if stopped:
        return 128 + stopped[0]
    assert re.fullmatch(r"\d+", str(total))
    (run / "finished").write_text(f"{total}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
