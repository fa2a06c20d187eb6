"""``python -m cupy_headnorm {demo, info, inspect, models, bench}``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cupy_headnorm import bench
from cupy_headnorm._arrays import dtypes
from cupy_headnorm._commands import demo as demo_command
from cupy_headnorm._commands import info as info_command
from cupy_headnorm._commands import inspect
from cupy_headnorm._commands import models as models_command
from cupy_headnorm._rules import options
from cupy_headnorm._version import __version__

_SCRIPT = "cupy-headnorm"
_COLUMNS = """\
A model's head norms, layers that are alike in one row:

  layers    those that have such a norm
  role      what is normalized: q, k, v; vision_q and the like of other towers
  shape     of the weight: (head_dim,) for one that all heads share
  dtype     of the weight, as safetensors spells it
  heads     the model's number of them; any where a norm takes any number
  kind      rms (RMSNorm) or layer (LayerNorm)
  offset    what the model adds to the weight: Gemma computes 1 + w
  eps       what is added to the mean square, or to the variance
  rounding  where results are rounded to the model's dtype: once, before_weight, every_op, rstd
  RoPE      whether the norm comes before the rotary embedding or after it, and how dims pair up

A second table has names, and the least, largest and mean value and the standard deviation of the
weights as they are stored. A third has what is refused, and why.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cupy_headnorm: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an error is one line on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    script = Path(sys.argv[0]).name
    prog = script if script == _SCRIPT else "python -m cupy_headnorm"
    chosen = _parser(prog).parse_args(given)
    chosen.command = f"{prog} {shlex.join(given)}"
    try:
        chosen.run(chosen)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("cupy_headnorm: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"cupy_headnorm: {message}", file=sys.stderr)
        return 2
    return 0


def _parser(prog: str = "python -m cupy_headnorm") -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="Per-head normalization on GPUs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="{demo,info,inspect,models,bench}")

    demo = commands.add_parser("demo", help="load a norm, run it here, check it and time it")
    demo.set_defaults(run=demo_command.run)
    demo.add_argument(
        "checkpoint",
        nargs="?",
        help="safetensors file or folder, whose config.json says what options do not; without it "
        "a sharded one like Qwen3's is written first",
    )
    demo.add_argument("--key", help="the norm's name in the checkpoint, without .weight")
    demo.add_argument("--kind", choices=tuple(options.DEFAULT_EPS), help="default: rms")
    demo.add_argument("--eps", type=float, help="default: 1e-6 for rms, 1e-5 for layer")
    demo.add_argument("--rounding", choices=options.ROUNDINGS)
    demo.add_argument("--weight-offset", type=float, help="1 for Gemma 3")
    demo.add_argument("--num-heads", type=bench.count, help="heads of x")
    demo.add_argument("--head-dim", type=bench.count, help="default: the weight's last axis")
    demo.add_argument("--heads-axis", type=int, default=-2)
    demo.add_argument("--tokens", type=int, help="tokens of the random x")
    demo.add_argument(
        "--dtype",
        choices=[dtype.name for dtype in dtypes.DTYPES],
        help="of the random x; default: the weight's",
    )
    demo.add_argument(
        "--activations",
        help="safetensors file with <key>.input, used as x, and, to compare, <key>.output",
    )
    demo.add_argument("--on", choices=("auto", "gpu", "cpu"), default="auto")

    info = commands.add_parser("info", help="versions, devices, what works and what to install")
    info.set_defaults(run=info_command.run)

    look = commands.add_parser(
        "inspect",
        help="a model's head norms, and what is refused and why",
        description=_COLUMNS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    look.set_defaults(run=_inspect)
    look.add_argument("checkpoint", help="folder with config.json and safetensors files")
    look.add_argument("--variant", help="part of the files' names: fp16 for model.fp16.safetensors")
    look.add_argument("--json", action="store_true", help="print JSON instead of tables")

    known = commands.add_parser("models", help="which models are supported, before a download")
    known.set_defaults(run=models_command.run)
    known.add_argument("name", nargs="?", help="Qwen3-Next, a hub id, a model_type; default: all")
    known.add_argument("--markdown", action="store_true", help="print all as a page in Markdown")

    measure = commands.add_parser("bench", help="speed beside a copy of the same bytes and peers")
    measure.set_defaults(run=lambda chosen: bench.run(chosen, chosen.command))
    bench.add_arguments(measure)
    return parser


def _inspect(chosen: argparse.Namespace) -> None:
    found = inspect.collect(chosen.checkpoint, chosen.variant)
    if chosen.json:
        print(json.dumps(found, indent=1))
    else:
        inspect.show(found)
