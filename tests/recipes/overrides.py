"""Random commands for the recipes, and what each must do: end well, or end with one line.

    python tests/recipes/overrides.py --number 300 --seed 0 --csv out.csv

Each runs in a process that is forked for it.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

if str(TESTS := Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(TESTS))
from fork_server import RECIPES, Forked, environment, shared

if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from tqdm import tqdm

from config.dac import DACConfig  # isort: skip
from config.ppo_pmoe import PPOConfig  # isort: skip
from config.sac_many_seeds import ManySeedsConfig  # isort: skip
from config.sac_pmoe import SACConfig  # isort: skip
from config.target_reaching import TargetReachingConfig  # isort: skip
from parts.errors import UsageError  # isort: skip
from config.typed import allowed, build, described_keys  # isort: skip

LIMIT = 600.0
"""Seconds after which a run hangs; it takes one or two, but what else the machine does is not ours."""
GRACE = 600.0
"""Seconds in which the processes of a run notice that it has ended; most are gone at once."""
MEMORY = 8 * 2**30
"""Bytes of addresses that a run may have: who asks for more must be told, and must not take the machine down."""

# ------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Rule:
    """What one key of a typed config may hold."""

    config: type
    key: str

    @property
    def allowed(self) -> str:
        return allowed(described_keys(self.config)[self.key])

    def parse(self, value: Any) -> None:
        """Raise ``ValueError`` where it is not allowed."""
        for name in reversed(self.key.split(".")):
            value = {name: value}
        try:
            build(self.config, value)
        except UsageError as error:
            raise ValueError from error


CONFIGS = {
    "sac_pmoe": SACConfig,
    "sac_many_seeds": ManySeedsConfig,
    "ppo_pmoe": PPOConfig,
    "dac": DACConfig,
    "target_reaching": TargetReachingConfig,
}
RULES = {name: {key: Rule(config, key) for key in described_keys(config)} for name, config in CONFIGS.items()}
SHARES = {"sac_pmoe": 4, "sac_many_seeds": 1, "ppo_pmoe": 3, "dac": 1, "target_reaching": 1}

_SHORT = {
    "network.hidden_sizes": "[16,16]",
    "logger.eval_interval": "50",
    "logger.eval_episodes": "1",
    "logger.eval_max_steps": "20",
    "compile.enabled": "false",
}
_SHORT_OFF_POLICY = {**_SHORT, "optim.batch_size": "16", "collector.init_random_frames": "20"}
_SHORT_ON_POLICY = {
    **_SHORT,
    "env": "Pendulum-v1",
    "collector.frames_per_batch": "24",
    "loss.num_minibatches": "2",
    "loss.ppo_epochs": "1",
}
BASES: dict[str, dict[str, str]] = {
    "sac_pmoe": {"env": "Pendulum-v1", **_SHORT_OFF_POLICY},
    "sac_many_seeds": {"env": "Pendulum-v1", "num_seeds": "2", **_SHORT_OFF_POLICY},
    "ppo_pmoe": {**_SHORT_ON_POLICY, "network.qvalue_hidden_sizes": "[16,16]"},
    "dac": _SHORT_ON_POLICY,
    "target_reaching": {
        **_SHORT_OFF_POLICY,
        "policies": "[pmoe]",
        "episodes": "10",
        "exploration_frames": "16",
        "collector.num_envs": "4",
        "replay_buffer.size": "1000",
    },
}
"""What makes a run a short one; ``total_frames`` is drawn."""

_words = str.split

TAME = _words("0 1 2 3 4 12 2e0 -0.0 1e-12 0.5 0.75 0.999999 1.0 1.5 1e-300 -3 true false null [8] [1] [16,8,4] {} cpu")
"""Values that one rule or another allows, and that leave a run a short one."""
WILD = [
    *_words("1e308 -1e308 1e400 1e6000 nan inf -inf 1e12 1000000000000 1e15 -1 1e-320 0x10 1e"),
    *_words("[] [[1]] [0] [-1] [1.5] [1000000000000] [a,b] [null] {a:1} {a:{b:2}} [ } ( a,b range(1,3) a=b"),
    *_words("nope None True yes '1' é∞🦜 $ ${env} ${oc.env:NOPE} ${nope} ${ ${seed} ${oc.env:LANG,C} ??? \\ %s * ~"),
    *_words("cuda:97 meta mps cpu:5 ../up /dev/null/x"),
    *("9" * 30, "", '""', "''", "a b", " 1 ", '"a b"', "x" * 5000, "a\nb", "'a\nb'", "\x1b[31mred", "'a\x1b[31mb'"),
]
"""Values that a user does not mean."""
SPECIAL: dict[str, list[str]] = {
    "env": [
        *_words("Pendulum-v1 InvertedPendulum-v4 Hopper-v4 MountainCarContinuous-v0 PMOE/TargetReaching-v0"),
        *_words("recipe_envs:NanReward-v0 recipe_envs:NanObservation-v0 recipe_envs:Pixels-v0"),
        *_words("recipe_envs:Unbounded-v0 CartPole-v1 NoSuchEnv-v0 Pendulum-v9 Pendulum nomodule:Env-v0"),
        *_words("json:Env-v0 : a/b/c ../../x"),
    ],
    "env_kwargs": _words("{} {g:5} {nope:1} {g:[1]} {render_mode:human} {layout:two} {g:nan} {1:2}"),
    "policies": _words("[gaussian] [mcp] [gating] [pmoe_soft] [pmoe_all] [pmoe,pmoe] gaussian"),
    "resume": [
        *_words("../run ../run ../other ../../given/nowhere ../../given/empty ../../given/foreign ../../given/torn"),
        *(".", "/dev/null"),
    ],
    "replay_buffer.scratch_dir": _words("scratch a/b . /dev/null/x /proc/nope"),
    "logger.project_name": _words("name a/b .. é"),
    "logger.backend": [
        *("csv", "null"),
        *(name for name in ("tensorboard", "wandb", "mlflow", "trackio") if find_spec(name) is None),
    ],
    "logger.eval_interval": _words("20 1e2 1e12 0"),
    "num_seeds": _words("1 2 0"),
    "optim.utd_ratio": _words("0.25 0.5 1 2 1.5 0 -1"),
    "seed": _words("0 7 2147483647 2147483648 2146483648 2144483648 4294967295"),
}
"""By key, values that mean something to it alone."""
ENDLESS = ("total_frames", "loss.ppo_epochs", "optim.utd_ratio")
"""Keys of which a huge value asks for a run without end, and gets it."""
SLOW = {
    "compile.enabled": ["false", "null"],  # the compiler takes half a minute
    "collector.backend": ["null", "serial"],  # processes import what the recipe does
    "num_workers": ["1"],
}
"""Keys that may ask for many seconds of work, and their values that do not."""

BROKEN = [
    *_words(
        "nonsense =x = é=1 .=1 optim..lr=1 - -- ' seed@x=1 x/y=z _self_=1 defaults=[x] hydra=x hydra.nope=1 config=x"
    ),
    *_words("optim.lr={a:1} optim.lr[0]=1 network.hidden_sizes[0]=8 network.hidden_sizes.0=8 seed=${seed} optim=null"),
    *_words(
        "+env_kwargs.g=5 +env_kwargs.nope=1 ~env_kwargs ~optim ~env=Nope +new=1 ++new=1 ~new +optim.new=1 logger={}"
    ),
    *("", " ", "\n", "a" * 5000, "x" * 300),
]
"""Arguments that are no ``key=value`` of the config."""
TEMPLATES = [
    *_words("{key} {key}= +{key}=1 ++{key}=1 ~{key} ~{key}=7 {key}==1 {key}:1 {key}.x=1 {key}=1,2 --{key}=1"),
    *_words("{upper}=1 {misspelt}=1 {group}=1 +{group}.new=1"),
    *("{key} =1", "{key}= 1", " {key}=1"),
]
"""Arguments that nearly are."""
HYDRA = [
    f"hydra.{argument}"
    for argument in (
        *_words("run.dir= run.dir=. run.dir=.. run.dir=a/b run.dir=é run.dir=/dev/null/x run.dir=/proc/nope"),
        *_words("run.dir=${nope} run.dir=null run.dir=[1] run.dir=${env} run.dir=1 run.dir=a\\=b output_subdir=x"),
        *_words("job.chdir=true verbose=true verbose=nope mode=MULTIRUN mode=nope job.name=é sweep.dir=s"),
        *("run.dir=a b", "run.dir=" + "x" * 300, "job.env_set.A=1"),
    )
]
HYDRA += ["hydra/launcher=nope", "hydra/job_logging=default"]
INFORMING = [
    *(("--help",), ("--version",), ("--hydra-help",), ("--info",), ("--cfg", "job"), ("-c", "hydra"), ("-c", "all")),
    ("--cfg", "job", "--resolve"),
]
"""Flags that print something and run nothing."""
FLAGS = [
    *(("-m", "seed=0,1"), ("-m", "seed=0,nope"), ("-m",), ("--run",), ("-m", "hydra.sweep.dir=/dev/null/x")),
    *(("--nope",), ("-x",), ("--cfg",), ("--cfg", "nope"), ("--resolve",), ("--info", "nope"), ("--package", "x")),
    *(("--config-name", "nope"), ("--config-dir", "nope"), ("--experimental-rerun", "nope"), ("seed=1", "seed=2")),
]


@dataclass(frozen=True)
class Command:
    """A recipe and its arguments.

    Args:
        recipe: the name of a file of ``recipes`` without its ending, or the path of another.
        args: what stands behind it.
        bad: whether a rule refuses one of the values.
    """

    recipe: str
    args: tuple[str, ...]
    bad: bool = False

    def __str__(self) -> str:
        return f"python {self.path} {shlex.join(self.args)}"

    @property
    def path(self) -> Path:
        """The file that is run."""
        path = Path(self.recipe)
        return path if path.is_absolute() else RECIPES / f"{self.recipe}.py"

    @property
    def informs(self) -> bool:
        """Whether it asks for a text instead of a run."""
        return any(flags[0] in self.args for flags in INFORMING)


@cache
def _read(text: str) -> Any:
    """The value that Hydra reads; an exception where it reads none."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException as error:
        return error
    return HydraException("a sweep") if override.is_sweep_override() else override.value()


def refuses(recipe: str, key: str, text: str) -> bool:
    """Whether the rule of a key, or Hydra before it, refuses a value; what is interpolated is not known here."""
    if "${" in text or text == "???":
        return False
    value = _read(text)
    try:
        RULES[recipe][key].parse(value)
    except (ValueError, TypeError, OverflowError):
        return True
    return isinstance(value, HydraException)


@cache
def tame_values(recipe: str, key: str) -> list[str]:
    """Values that leave a run a short one, or that no run is made with."""
    if (key in SLOW or key in SPECIAL) and (recipe, key) != ("sac_pmoe", "num_seeds"):
        return SLOW.get(key) or SPECIAL[key]
    names = re.findall(r"[a-z]\w*", RULES[recipe][key].allowed)
    return [text for text in dict.fromkeys((*TAME, *names)) if not refuses(recipe, key, text)]


@cache
def wild_values(recipe: str, key: str) -> tuple[list[str], list[str]]:
    """Values that a user does not mean: those that the rule lets pass all the same, and those that it refuses."""
    refused = [text for text in (*TAME, *WILD) if refuses(recipe, key, text)]
    endless = key in ENDLESS or key in SLOW
    return [] if endless else [text for text in WILD if text not in refused], refused


def command(seed: int, index: int) -> Command:
    """The ``index``-th command under ``seed``."""
    rng = random.Random(f"{seed}-{index}")
    recipe = rng.choices(list(SHARES), list(SHARES.values()))[0]
    chosen = _overrides(rng, recipe)
    short = {**BASES[recipe], "total_frames": str(rng.randint(40, 130))}
    if chosen.get("resume", "null").startswith(".."):
        # the rest belongs to the run that goes on
        short = {"total_frames": "150"}
    oddities = _oddities(rng, recipe) if rng.random() < 0.25 else ()
    bad = not oddities and any(refuses(recipe, key, text) for key, text in chosen.items())
    args = [f"{key}={text}" for key, text in {**short, **chosen}.items()]
    if oddities and oddities[0].startswith("-") and rng.random() < 0.7:
        return Command(recipe, (*oddities, *args), bad)
    return Command(recipe, (*args, *oddities), bad)


def _overrides(rng: random.Random, recipe: str) -> dict[str, str]:
    """Values of up to four keys."""
    chosen = {}
    for key in rng.sample(list(RULES[recipe]), rng.choice((0, 1, 1, 2, 2, 3, 4))):
        passed, refused = wild_values(recipe, key)
        kinds = [tame_values(recipe, key), passed or refused, refused]
        if key != "total_frames" or rng.random() < 0.5:
            chosen[key] = rng.choice(rng.choices(kinds, (6, 2, 1))[0])
    return chosen


def _oddities(rng: random.Random, recipe: str) -> tuple[str, ...]:
    """Arguments that set no key of the config, or set it in an odd way."""
    kind = rng.choice(("broken", "template", "template", "hydra", "hydra", "flag", "informing"))
    if kind == "flag":
        return rng.choice(FLAGS)
    if kind == "informing":
        return rng.choice(INFORMING)
    if kind == "template":
        key = rng.choice(list(RULES[recipe]))
        place = rng.randrange(len(key))
        words = {"misspelt": key[:place] + key[place + 1 :], "group": key.split(".")[0], "upper": key.upper()}
        return (rng.choice(TEMPLATES).format(key=key, **words),)
    return (rng.choice(BROKEN if kind == "broken" else HYDRA),)


# ------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Args:
        command: that was run.
        home: its directory: it ran in ``cwd``, had ``tmp`` for temporary files, and may have written beside them.
        status: its exit status, negative for a signal; ``None`` where it had to be killed.
        seconds: from the start to the end of the process, without those that it waited for a processor.
        processes: that were left.
    """

    command: Command
    home: Path
    status: int | None
    seconds: float
    processes: tuple[str, ...]

    @property
    def stdout(self) -> str:
        """What it printed."""
        return (self.home / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it printed there."""
        return (self.home / "stderr").read_bytes().decode(errors="replace")  # a carriage return stays one

    @property
    def said(self) -> list[str]:
        """The lines on stderr that are no progress bar."""
        return [line for line in re.split(r"[\r\n]|\x1b\[A", self.stderr) if line.strip() and not BAR.fullmatch(line)]


BAR = re.compile(r" *(\d+%\|.*\| *)?\S+/?\S* *(frames|run)? ?\[\d\d:\d\d.*(frames|run|s)\S*(, .*)?\]")
"""A progress bar as tqdm prints it between two carriage returns."""


class Runner:
    """Runs commands one after the other, each in a directory of its own.

    Args:
        root: where these directories are made.
        limit: seconds that a command may take.
    """

    def __init__(self, root: Path, limit: float = LIMIT) -> None:
        self.root, self.limit = root, limit
        self.root.mkdir(parents=True, exist_ok=True)
        _write_given(root / "given")
        self._made = 0

    def __call__(self, command: Command) -> Outcome:
        """Run one command to its end, or kill it; nothing of it is left running."""
        self._made += 1
        home = self.root / str(self._made)
        for name in ("cwd", "tmp"):
            (home / name).mkdir(parents=True)
        self._lay_out_runs(command, home)
        pid, status, seconds = self._run(command, home)
        left = _wait_for_strays(pid, home)
        while strays := _strays(pid, home):
            for stray in strays:
                _kill(stray)
            time.sleep(0.01)
        return Outcome(command, home, status, seconds, tuple(left.values()))

    def _run(self, command: Command, home: Path) -> tuple[int, int | None, float]:
        """Process id, exit status and seconds."""
        with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
            process = self._start(command, home, out, err)
        return process.pid, *watch(process, self.limit)

    def _start(self, command: Command, home: Path, out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes] | Forked:
        return subprocess.Popen(
            [sys.executable, str(command.path), *command.args],
            cwd=home / "cwd",
            env=environment() | {"TMPDIR": str(home / "tmp")},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            preexec_fn=_limit_memory,
        )

    def _lay_out_runs(self, command: Command, home: Path) -> None:
        """Runs to go on with, where the command names them."""
        for place, recipe in (("run", command.recipe), ("other", _other(command.recipe))):
            if f"resume=../{place}" in command.args:
                run = self.root / "given" / recipe
                if not run.is_dir():
                    self._make_run(recipe, run)
                shutil.copytree(run, home / place)

    def _make_run(self, recipe: str, run: Path) -> None:
        args = [
            f"{key}={text}" for key, text in {**BASES[recipe], "total_frames": "48", "hydra.run.dir": "run"}.items()
        ]
        made = self(Command(recipe, tuple(args)))
        if made.status == 0:
            (made.home / "cwd" / "run").rename(run)


class Server(Runner):
    """A runner whose commands are forked from one process that has imported everything."""

    def _start(self, command: Command, home: Path, out: IO[bytes], err: IO[bytes]) -> Forked:
        return shared().start(
            [str(command.path), *command.args],
            cwd=home / "cwd",
            env=environment() | {"TMPDIR": str(home / "tmp")},
            files=(out.fileno(), err.fileno()),
            memory=MEMORY,
        )


def watch(process: subprocess.Popen[bytes] | Forked, limit: float) -> tuple[int | None, float]:
    """Wait for the end of a process, or kill it and its group.

    Returns:
        Its exit status, ``None`` where it was killed, and its seconds. Those in which it waited for a processor do not
        count: they are other programs'.
    """
    started, waited = time.monotonic(), 0.0

    def seconds() -> float:
        return time.monotonic() - started - waited

    while process.poll() is None and seconds() < limit:
        waited = max(waited, _waited(process.pid))
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    taken = seconds()
    if process.returncode is not None:
        return process.returncode, taken
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None, taken


def _waited(pid: int) -> float:
    """Seconds that a process has waited for a processor, where the system counts them."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _write_given(given: Path) -> None:
    """Directories that are no runs."""
    (given / "empty").mkdir(parents=True)
    for name, config, manifest in (("foreign", "a: 1\n", "{}"), ("torn", "env: [", '{"comp')):
        checkpoint = given / name / "checkpoints" / "checkpoint-000000000040"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(manifest)
        (given / name / "config.yaml").write_text(config)


def _other(recipe: str) -> str:
    return "ppo_pmoe" if recipe != "ppo_pmoe" else "dac"


def _wait_for_strays(session: int, home: Path) -> dict[int, str]:
    """Processes that a command has left, by id, once they had time to end."""
    end = time.monotonic() + GRACE
    while (found := _strays(session, home)) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _strays(session: int, home: Path) -> dict[int, str]:
    """Processes of a session, and those that were started with its directory for temporary files."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            ours = int(of) == session or f"TMPDIR={home / 'tmp'}\0".encode() in (entry / "environ").read_bytes()
            if ours and state not in "ZX":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # noqa: PERF203  (it has ended meanwhile)
            continue
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------- verdict


def faults(outcome: Outcome) -> list[str]:
    """What a user would complain about; nothing, if the command ended well or with one clear line."""
    found = [f"leaves the process {name}" for name in outcome.processes]
    found += [f"leaves the temporary file {name}" for name in _names(outcome.home / "tmp")]
    if "Traceback" in outcome.stderr + outcome.stdout:
        found.append("prints a traceback")
    if outcome.status is None:
        found.append(f"hangs: killed after {outcome.seconds:.1f} s")
    elif outcome.status == 0:
        found += _faults_of_success(outcome)
    elif outcome.status in (1, 2):
        found += _faults_of_refusal(outcome)
    else:
        found.append(f"ends with status {outcome.status}")
    return found


def _faults_of_success(outcome: Outcome) -> Iterator[str]:
    if outcome.said:
        yield f"prints {len(outcome.said)} lines on stderr though it ends well"
    if outcome.command.bad:
        yield "accepts a value that its rule refuses"
    if outcome.command.informs:
        if not outcome.stdout.strip():
            yield "says nothing"
    elif not _trained(outcome):
        yield "leaves no metrics.csv"


def _faults_of_refusal(outcome: Outcome) -> Iterator[str]:
    failed = [line for line in outcome.said if line.startswith("failed: ")]
    if len(outcome.said) != (2 * len(failed) or 1):
        yield f"prints {len(outcome.said)} lines on stderr, not one"
    elif not outcome.said[0].startswith("error: "):
        yield "prints a line that does not begin with error:"
    # the runs of a sweep before the one that is refused, and the config itself, were asked for
    if outcome.status == 2 and not _trained(outcome):
        if outcome.stdout.strip():
            yield "prints on stdout before it refuses the config"
        if not any("output_subdir" in argument for argument in outcome.command.args):
            yield from (f"leaves {name} though it refuses the config" for name in _names(outcome.home / "cwd"))


def _trained(outcome: Outcome) -> bool:
    return any(path.stat().st_size for path in outcome.home.rglob("metrics.csv"))


def _names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.iterdir())


# ------------------------------------------------------------------------------------------- by hand


def last_line(outcome: Outcome) -> str:
    """The last thing that a command said."""
    lines = (outcome.said or outcome.stdout.splitlines() or [""])[-1]
    return lines if len(lines) <= 300 else f"{lines[:300]}..."


@contextmanager
def scratch(keep: Path | None = None) -> Iterator[Path]:
    """An empty directory, removed at the end if it is not to be kept."""
    if keep is not None:
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory).resolve()


def main() -> int:
    """Run random commands and write down what each did; the number of those at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help="how many commands")
    parser.add_argument("--seed", type=int, default=0, help="of the commands")
    parser.add_argument("--csv", type=Path, help="a row for every command")
    parser.add_argument("--keep", type=Path, help="a new directory for everything that the commands leave")
    options = parser.parse_args()
    rows = []
    with scratch(options.keep) as root:
        run = Server(root)
        for index in tqdm(range(options.number), unit="command"):
            outcome = run(command(options.seed, index))
            wrong = faults(outcome)
            rows.append(
                {
                    "index": index,
                    "recipe": outcome.command.recipe,
                    "overrides": shlex.join(outcome.command.args),
                    "status": outcome.status,
                    "seconds": round(outcome.seconds, 2),
                    "last line": last_line(outcome),
                    "faults": "; ".join(wrong),
                }
            )
            if wrong:
                tqdm.write(f"{index}: {outcome.command}\n    {'; '.join(wrong)}\n    {last_line(outcome)}")
            if options.keep is None:
                shutil.rmtree(outcome.home)
    if options.csv is not None:
        _write_table(options.csv, rows)
    return sum(bool(row["faults"]) for row in rows)


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
