"""The command line: `hybrid doctor | profile | plan | simulate | train | submit | bench | export | validate | parity`.

Thin: parses words, calls `hybrid.commands`, turns errors into one line and an exit code. Imports neither torch nor
Ray nor pydantic before a command needs them, so that `hybrid --help` answers at once.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from hybrid.bench import BENCHES, TUNERS
from hybrid.errors import HybridError

_STARTED_S = time.monotonic()
_INTERRUPTED = 130
"""What a shell reports for a command that Ctrl-C ended."""

app = typer.Typer(
    name="hybrid",
    help="Train one model across AWS Trainium and NVIDIA GPUs as one job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Measure; every figure beside what one would use instead.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Job = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML); see examples/.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
Address = Annotated[str | None, typer.Option("--address", help="HOST:PORT of a running Ray, or `auto`.")]
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the job: `--set batch.microbatch=2`."),
]


@app.command()
def doctor(json: Json = False) -> None:
    """Check each backend, each transport and Ray: PASS, or why not."""
    from hybrid.commands.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=json))


@app.command()
def plan(
    job: Job,
    address: Address = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="throughput, usd_per_token, joules_per_token or deadline.")
    ] = None,
    min_tokens_per_s: Annotated[float | None, typer.Option("--min-tokens-per-s", help="Refuse slower plans.")] = None,
    max_usd_per_hour: Annotated[float | None, typer.Option("--max-usd-per-hour", help="Refuse dearer plans.")] = None,
    max_watts: Annotated[float | None, typer.Option("--max-watts", help="Refuse plans of more rated power.")] = None,
    deadline: Annotated[
        float | None, typer.Option("--deadline", help="Seconds in which all of the job's steps must be done.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Each layer's seconds (JSON), of `hybrid profile` or imported.")
    ] = None,
    links: Annotated[Path | None, typer.Option("--links", help="Every link (JSON); docs/formats.md.")] = None,
    pools: Annotated[Path | None, typer.Option("--pools", help="Chips (JSON) instead of the job's fleet.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Why this plan, and what would change it.")] = False,
    json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write the plan: YAML for `hybrid train --plan`; FILE.json: groups of replicas."),
    ] = None,
    override: Override = None,
) -> None:
    """Print where each layer goes and the simulated step; take no device."""
    from hybrid.commands.plan import PlanWords, run_plan
    from hybrid.commands.problem import Brought

    words = PlanWords(
        overrides=override or [],
        objective=objective,
        limits={
            "min_tokens_per_s": min_tokens_per_s,
            "max_usd_per_hour": max_usd_per_hour,
            "max_watts": max_watts,
            "deadline_s": deadline,
        },
        brought=Brought(profile=profile, links=links, pools=pools),
        explain=explain,
    )
    run_plan(job, words, address=address, as_json=json, out=out)


@app.command()
def train(
    job: Job,
    address: Address = None,
    reference: Annotated[bool, typer.Option("--reference", help="The same job in one process, no pipeline.")] = False,
    resume: Annotated[Path | None, typer.Option("--resume", help="A run folder or a checkpoint.")] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan (YAML) to run instead of the planner's.")
    ] = None,
    json: Json = False,
    override: Override = None,
) -> None:
    """Train a job on its fleet."""
    from hybrid.commands.train import run_train

    run_train(
        job,
        address=address,
        reference=reference,
        resume=resume,
        plan_file=plan_file,
        as_json=json,
        overrides=override or [],
        started_s=_STARTED_S,
    )


@app.command()
def profile(
    job: Job,
    out: Annotated[Path | None, typer.Option("--out", help="Write the profile (JSON) to this file.")] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=1000, help="Runs of each layer; the median counts.")
    ] = 5,
    json: Json = False,
    override: Override = None,
) -> None:
    """Run each distinct layer on each kind of device and print what it costs."""
    from hybrid.commands.profile import run_profile

    run_profile(job, out=out, rounds=rounds, as_json=json, overrides=override or [])


@app.command()
def simulate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan (YAML) that `hybrid plan --out` wrote.")],
    trace: Annotated[Path | None, typer.Option("--trace", help="Write a trace for Perfetto or Chrome (JSON).")] = None,
    availability: Annotated[
        Path | None, typer.Option("--availability", help="Chips that come and go (CSV or JSON); gives goodput.")
    ] = None,
    recovery_s: Annotated[
        float, typer.Option("--recovery-s", min=0, help="From a change of the fleet to the next step.")
    ] = 60.0,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", min=1, help="Tokens in a sample; without, samples are counted.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a plan's step on paper: time line, throughput, dollars, energy."""
    from hybrid.commands.simulate import run_simulate

    run_simulate(
        plan,
        trace=trace,
        availability=availability,
        recovery_s=recovery_s,
        sequence_length=sequence_length,
        as_json=json,
    )


@app.command()
def parity(
    job: Job,
    steps: Annotated[int, typer.Option("--steps", min=1, max=1000, help="The job's first steps.")] = 3,
    json: Json = False,
    override: Override = None,
) -> None:
    """Compare each layer under its chip's emulated numerics with fp32 on the CPU."""
    from hybrid.commands.parity import run_parity_command

    raise typer.Exit(run_parity_command(job, steps=steps, as_json=json, overrides=override or []))


@app.command()
def submit(
    job: Job,
    address: Annotated[str, typer.Option("--address", help="URL of the cluster's dashboard: http://HOST:8265.")],
    override: Override = None,
) -> None:
    """Run a job by Ray Jobs on a cluster; follow its log; return its exit status."""
    from hybrid.commands.submit import run_submit

    raise typer.Exit(run_submit(job, address=address, overrides=override or []))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or a checkpoint.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to make.")],
) -> None:
    """Write a run's weights as one safetensors file, with its config and tokenizer."""
    from hybrid.commands.export import run_export

    run_export(run, to=to)


@app.command()
def validate(
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or neuron.")] = None,
    chip: Annotated[str | None, typer.Option("--chip", help="The catalog's name of it: h100, trn2, …")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Write the report (JSON) to send back.")] = None,
    fake: Annotated[bool, typer.Option("--fake", help="Run on the fake neuron device; the report says so.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer formats, smaller timings.")] = False,
    nki_examples: Annotated[
        Path | None,
        typer.Option("--nki-examples", help="The `nki` folder of aws-neuron-sdk: run its kernels on our interpreter."),
    ] = None,
    json: Json = False,
) -> None:
    """Run the kits, kernels, numerics, a two-stage job and timings on a real device."""
    if nki_examples is not None:
        from hybrid.commands.nki_examples import run_nki_examples

        raise typer.Exit(run_nki_examples(nki_examples, as_json=json))
    if device is None:
        raise typer.BadParameter("give --device cpu, cuda or neuron (or --nki-examples FOLDER)")
    from hybrid.commands.validate import run_validate

    raise typer.Exit(run_validate(device, chip=chip, to=to, fake=fake, quick=quick, as_json=json))


def _add_bench(name: str, what: str) -> None:
    @bench_app.command(name, help=what)
    def bench(
        json: Json = False,
        quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats.")] = False,
    ) -> None:
        from hybrid.commands.bench import run_bench

        run_bench(name, as_json=json, quick=quick)


def _add_tunable_bench(name: str, what: str) -> None:
    @bench_app.command(name, help=what)
    def bench(
        json: Json = False,
        quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats.")] = False,
        tune: Annotated[
            bool, typer.Option("--tune", help="Try every algorithm; print the table of the fastest on this machine.")
        ] = False,
    ) -> None:
        from hybrid.commands.bench import run_bench

        run_bench(name, as_json=json, quick=quick, tune=tune)


for _name, (_where, _what) in BENCHES.items():
    (_add_tunable_bench if _name in TUNERS else _add_bench)(_name, _what)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; the entry point of the script `hybrid`.

    Args:
        argv: the words after `hybrid`; default: the process's own.

    Raises:
        SystemExit: always. 0: done; 1: failed; 2: what the user gave is wrong, told in one line; 130: interrupted.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(args=None if argv is None else list(argv), prog_name="hybrid", standalone_mode=False)
    except HybridError as error:
        # A worker's failure carries its traceback; what the user gave wrong is one line, whatever is in it.
        text = str(error) if error.exit_code == 1 else " ".join(str(error).split())
        print(f"hybrid: {text}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        exit_code = getattr(error, "exit_code", None)  # a wrong command line
        if exit_code is None or not hasattr(error, "format_message"):
            raise
        print(_usage(error), file=sys.stderr)
        raise SystemExit(exit_code) from None
    if code == _INTERRUPTED:  # typer may have turned Ctrl-C into this code itself
        print("hybrid: interrupted; everything that was started is ended", file=sys.stderr)
    raise SystemExit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> str:
    """Return a wrong command line's error in one line; the help itself where no command was given."""
    context = getattr(error, "ctx", None)
    if context is None or type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    commands = getattr(context.command, "commands", None)
    options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    fact, guess, hint = error.format_message().rstrip(".").partition("Did you mean")
    see = f"see `{context.command_path} --help`"
    told = HybridError(fact.rstrip(" ."), valid=commands or options, fix=f"{guess}{hint} {see}".strip())
    return f"hybrid: {' '.join(str(told).split())}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A SIGTERM is an orderly end: the same clean-up as Ctrl-C.
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
