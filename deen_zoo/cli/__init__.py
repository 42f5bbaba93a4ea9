"""``deen-zoo VERB ...``, also as ``python -m deen_zoo VERB ...``.

Each verb is a module of this folder with a docstring (its one-line help), ``EXAMPLES``,
``add_arguments(parser)`` and ``run(args) -> exit code``, and ``STOPPED``, what to add when it was
interrupted, if anything. Only the verb that is asked for is imported.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from .. import terminal
from ..errors import UserError

VERBS = {
    "reproduce": "check data, train, evaluate every protocol, write a report and weights",
    "evaluate": "score any model's saved features by a named protocol",
    "extract": "write the descriptors of images or folders to a feature file",
    "search": "rank a gallery for each query image, or calibrate a match threshold",
    "visualize": "draw ranking sheets, similarity histograms, t-SNE or activation maps",
    "check": "check a dataset folder: counts next to the expected ones, every fault by name",
    "synthesize": "write a synthetic dataset in one of the three layouts",
    "weights": "list the public weights of real people, and which are installed",
    "convert": "convert a public checkpoint to a folder that timm loads",
    "quantize": "write int8 weights for OpenVINO, calibrated and checked on images",
    "project": "fit short descriptors: PCA of features",
    "publish": "publish a checkpoint folder to the Hugging Face Hub, with its model card",
    "export": "write a model as ONNX, OpenVINO, TorchScript or torch.export, checked against torch",
}

# What a verb needs at once, where that is not the models: importing timm takes twice torch's time.
LIGHT = {
    "evaluate": "evaluation",
    "search": "search",
    "visualize": "visualize",
    "check": "data.check",
    "synthesize": "synthetic.tree",
    "project": "features.project",
}

USER_ERROR, BROKEN_PIPE = 2, 141
ENDED = (("interrupted", 130), ("terminated", 143))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with the nearest option where one is not known."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        self.exit(
            USER_ERROR,
            f"{self.prog}: error: {_one_line(message)}; {hint}See '{self.prog} --help'\n",
        )


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.option_strings and type(action.default) in (str, int, float)
        known = said and action.default not in ("", argparse.SUPPRESS, -math.inf)
        return f"{action.help} (default: %(default)s)" if known else action.help


def _overview() -> argparse.ArgumentParser:
    from .. import __version__

    lines = "\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items())
    parser = _Parser(
        prog="deen-zoo",
        description="Visible-infrared person re-identification: models, training, search.",
        epilog=f"verbs:\n{lines}\n\n'deen-zoo VERB --help' shows a verb's options and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deen_zoo {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do, see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    return parser


def load_verb(verb: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """The verb's module and the parser of its arguments."""
    module = importlib.import_module(f"{__name__}.{verb}")
    parser = _Parser(
        prog=f"deen-zoo {verb}",
        description=module.__doc__,
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=_Help,
    )
    module.add_arguments(parser)
    return module, parser


def seed(text: str) -> int:
    """The type of ``--seed``: what every random generator takes."""
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number below {2**32}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments after the program's name; ``sys.argv[1:]`` when None.

    Returns:
        The exit code: 0 done, 1 the input was read and found unusable, 2 bad input (one line on
        stderr says what and what to do), 130 interrupted, 141 the reader of stdout has left,
        143 terminated.
    """
    with terminal.safe_streams():
        code = BROKEN_PIPE
        try:
            code = _run(argv)
        except SystemExit as done:  # of argparse: help, or a mistake
            code = done.code if isinstance(done.code, int) else USER_ERROR
            raise
        except BrokenPipeError:
            code = BROKEN_PIPE
        finally:
            if not _flush():
                code = BROKEN_PIPE
            if terminal.is_command():
                terminal.exit_quietly(code)
        return code


def _run(argv: Sequence[str] | None) -> int:
    overview = _overview()
    if not (sys.argv[1:] if argv is None else argv):
        overview.print_help(sys.stderr)
        return USER_ERROR
    first = overview.parse_args(argv)
    module, parser = load_verb(first.verb)
    args = parser.parse_args(first.arguments)
    # Seconds in which a signal just ends us: raised within an import, it could be swallowed there.
    importlib.import_module(f"deen_zoo.{LIGHT.get(first.verb, 'models')}")
    from ..device import keep_freed_memory

    keep_freed_memory()
    if terminal.is_command():
        terminal.interrupt_work()
    try:
        return int(module.run(args))
    except BrokenPipeError:
        raise
    except BaseException as error:
        # An import that is interrupted may raise an ImportError or the like instead.
        stop = error if isinstance(error, KeyboardInterrupt) else terminal.received()
        if stop is not None:
            name, code = ENDED[isinstance(stop, terminal.Terminated)]
            print(f"deen-zoo {first.verb}: {name}{getattr(module, 'STOPPED', '')}", file=sys.stderr)
            return code
        if isinstance(error, (UserError, OSError)):
            print(f"deen-zoo {first.verb}: error: {_one_line(error)}", file=sys.stderr)
            return USER_ERROR
        raise


def _flush() -> bool:
    """Write out what stdout holds; False if its reader has left, and then it holds nothing."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return False
    return True


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
