"""The command line: `longtrain COMMAND [key=value ...]`. Nothing else parses arguments.

Exit codes: 0 done, 2 refused, 75 preempted and saved, 130 interrupted, 1 anything else. A handler imports what it
runs, so that `longtrain --help` and a mistyped key never wait for torch or Ray.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import longtrain
from longtrain.core.errors import LongtrainError, Refused
from longtrain.core.registry import did_you_mean

_OVERRIDES_HELP = (
    "settings as key=value, group=option, +key=value (a new key) or ~key (remove it); lengths take units: 128k, 1M"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors have been printed."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except LongtrainError as error:
        print(f"longtrain: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("longtrain: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `longtrain config | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def _run(argv: list[str]) -> int:
    parser, commands = _build_parser()
    if not argv:
        parser.print_help()
        return 2
    if not argv[0].startswith("-") and argv[0] not in commands:
        if "=" in argv[0]:
            raise Refused(f"'{argv[0]}' is not a command; did you mean 'longtrain train {argv[0]}'?")
        raise Refused(f"there is no command '{argv[0]}'{did_you_mean(argv[0], list(commands))}")
    try:
        arguments, rest = parser.parse_known_args(argv)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    command = commands.get(argv[0], parser)
    for word in rest:
        if word.startswith("-"):
            raise Refused(_unknown_flag(word, command))
    if rest and not hasattr(arguments, "overrides"):
        raise Refused(f"'{rest[0]}' is one argument too many; `longtrain {argv[0]} --help` shows how it is used")
    if rest:  # settings that follow a flag
        arguments.overrides += rest
    return arguments.handler(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice is not None:
            message = f"there is no '{choice[1]}'{did_you_mean(choice[1], re.findall(r'[a-z]+', choice[2]))}"
        raise Refused(f"{message}; `{self.prog} --help` shows how it is used")


def _unknown_flag(word: str, parser: argparse.ArgumentParser) -> str:
    flag, _, value = word.partition("=")
    setting = flag.lstrip("-").replace("-", "_")
    if value:
        return f"unknown flag {flag}; settings have no dashes: {setting}={value}"
    known = sorted(set(re.findall(r"--[a-z][a-z-]*", parser.format_usage())))
    hint = did_you_mean(flag, known) if known else ""
    return f"unknown flag {flag}{hint}; settings have no dashes: key=value"


@dataclass(frozen=True)
class _Command:
    handler: Callable[[argparse.Namespace], int]
    summary: str
    examples: tuple[str, ...]
    """What follows the command's name."""
    add_arguments: Callable[[argparse.ArgumentParser], None]


def _build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command."""
    parser = _Parser(prog="longtrain", description=longtrain.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"longtrain {longtrain.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, command in _COMMANDS.items():
        examples = "\n".join(f"  longtrain {name} {example}".rstrip() for example in command.examples)
        commands[name] = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            conflict_handler="resolve",
        )
        commands[name].set_defaults(handler=command.handler)
        command.add_arguments(commands[name])
    return parser, commands


def _overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=_OVERRIDES_HELP)


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yaml", action="store_true", help="values alone, without their origins")
    _overrides(parser)


def _address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="the cluster's job server, such as http://127.0.0.1:8265; default: Ray's own")


def _submit_arguments(parser: argparse.ArgumentParser) -> None:
    _address(parser)
    parser.add_argument("--no-follow", dest="follow", action="store_false", help="return once the job is accepted")
    _overrides(parser)


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    _address(parser)
    parser.add_argument("job", help="the job's id, as `longtrain jobs` lists it")


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _job_arguments(parser)
    parser.add_argument("--follow", action="store_true", help="go on until the job ends")


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["verify"], help="what to do")
    parser.add_argument("path", type=Path, help="a run directory or a checkpoint")


class _BenchHelp(argparse.Action):
    """Of the benchmark that has been named before, else of the command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object) -> None:
        if namespace.name is None:
            parser.print_help()
        else:
            from longtrain.bench import help_text

            print(help_text(namespace.name, namespace.overrides))
        parser.exit()


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", action=_BenchHelp, nargs=0, help="show this; behind a name, its options")
    parser.add_argument("name", nargs="?", help="the benchmark; without it, they are listed")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="its options; out=FILE writes JSON"
    )


def _train(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.resolve import resolve

    job = resolve(arguments.overrides)
    from longtrain.cluster.run import run_job  # loads Ray; a mistake has been answered by now

    return run_job(job.tree, job.registry.plugins)


def _resume(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.resolve import resolve

    job = resolve(arguments.overrides)
    run, tree = job.config.run, job.tree
    directory = run.dir / str(run.name)
    if job.config.resume == "never":
        raise Refused("resume=never contradicts `longtrain resume`; leave it out, or use `longtrain train`")
    if job.config.resume == "auto":
        # the run directory of a joined cluster need not be visible from here; there the ranks look
        if job.config.cluster.address == "local" and not _checkpoints(directory):
            raise Refused(f"{directory} holds no checkpoint to go on from; start it with `longtrain train`")
        tree = tree | {"resume": "required"}
    from longtrain.cluster.run import run_job

    return run_job(tree, job.registry.plugins)


def _config(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.resolve import resolve
    from longtrain.config.show import to_yaml

    job = resolve(arguments.overrides)
    print(to_yaml(job.tree, None if arguments.yaml else job.origins), end="")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.resolve import resolve

    job = resolve(arguments.overrides)
    from longtrain.data.prepare import prepare
    from longtrain.training.objective import check_data

    def progress(documents: int, tokens: int) -> None:
        print(f"{documents} documents, {tokens} tokens", file=sys.stderr)

    print(prepare(job.config.data, job.registry, progress))
    try:
        check_data(job.config, job.registry)
    except Refused as refusal:  # the store may be for other settings
        print(f"longtrain: prepared, but `longtrain train` would refuse these settings: {refusal}", file=sys.stderr)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.resolve import resolve

    job = resolve(arguments.overrides)  # a mistake is found here, before anything is sent
    from longtrain.cluster.jobs import submit

    return submit(
        arguments.overrides,
        arguments.address,
        arguments.follow,
        str(job.config.run.name),
        job.config.run.dir.absolute(),
    )


def _jobs(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.jobs import jobs

    return jobs(arguments.address)


def _logs(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.jobs import logs

    return logs(arguments.job, arguments.address, arguments.follow)


def _stop(arguments: argparse.Namespace) -> int:
    from longtrain.cluster.jobs import stop

    return stop(arguments.job, arguments.address)


def _bench(arguments: argparse.Namespace) -> int:
    from longtrain.bench import run_benchmark, summaries

    if arguments.name is None:
        found = summaries()
        indent = max(map(len, found)) + 2
        for name, (summary, options) in found.items():
            print(f"{name:{indent}}{summary}\n{'':{indent}}options: {' '.join(options)}")
        return 0
    if "=" in arguments.name:
        raise Refused(f"{arguments.name}: the benchmark's name comes first; `longtrain bench` lists them")
    return run_benchmark(arguments.name, arguments.overrides)


def _checkpoint_verify(arguments: argparse.Namespace) -> int:
    path: Path = arguments.path
    if not path.is_dir():
        raise Refused(f"{path} is not a folder; give a run directory or one of its checkpoints")
    found = [path] if re.fullmatch(r"step-\d+", path.resolve().name) else _checkpoints(path)
    if not found:
        raise Refused(f"{path} holds no checkpoint; give a run directory or one of its checkpoints")
    from longtrain.checkpoint.verify import verify

    corrupt = False
    for checkpoint in found:
        problems = verify(checkpoint)
        corrupt |= bool(problems)
        print(f"corrupt  {checkpoint}: {'; '.join(problems)}" if problems else f"ok       {checkpoint}")
    return int(corrupt)


def _checkpoints(directory: Path) -> list[Path]:
    """Committed checkpoints of a run directory (or of its `checkpoints` folder), oldest first."""
    folders = [*directory.glob("checkpoints/step-*"), *directory.glob("step-*")]
    return sorted(f for f in folders if f.is_dir() and re.fullmatch(r"step-\d+", f.name))


_COMMANDS = {
    "train": _Command(
        _train,
        "train; the same command again goes on where it stopped",
        ("", "steps=1000 context_length=128k sequence_parallel.size=8", "model.pattern='[gated_delta x3, softmax]'"),
        _overrides,
    ),
    "resume": _Command(
        _resume,
        "train, but never start anew: there must be a checkpoint to go on from",
        ("run.name=mine", "run.name=mine cluster.workers=8"),
        _overrides,
    ),
    "config": _Command(
        _config,
        "print the resolved configuration and where each value came from",
        ("", "model=hybrid_tiny context_length=1M", "--yaml steps=1000"),
        _config_arguments,
    ),
    "prepare": _Command(
        _prepare,
        "turn the configured data into a token store; one that exists is used again",
        ("", "data=python_stdlib data.store=/fast/disk/store"),
        _overrides,
    ),
    "submit": _Command(
        _submit,
        "send a training job to a Ray cluster and follow its log",
        ("--address http://127.0.0.1:8265 steps=1000", "--no-follow run.name=mine sequence_parallel.size=8"),
        _submit_arguments,
    ),
    "jobs": _Command(_jobs, "list the jobs of a Ray cluster", ("", "--address http://127.0.0.1:8265"), _address),
    "logs": _Command(_logs, "print the log of a job", ("JOB", "JOB --follow"), _logs_arguments),
    "stop": _Command(
        _stop,
        "stop a job; it saves a checkpoint first",
        ("JOB", "JOB --address http://127.0.0.1:8265"),
        _job_arguments,
    ),
    "checkpoint": _Command(
        _checkpoint_verify,
        "verify the digests of checkpoints",
        ("verify runs/mine", "verify runs/mine/checkpoints/step-00000020"),
        _checkpoint_arguments,
    ),
    "bench": _Command(
        _bench,
        "measure this machine and what runs on it",
        (
            "",
            "kernels ops=[scalar,gated] shapes=1x32kx16x128 direction=forward out=scalar.json",
            "sequence-parallel ranks=4",
        ),
        _bench_arguments,
    ),
}
