"""What the scripts share and what teaches nothing: flags, device, tables, results, figures; timing.py is about time.

Every script begins with

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, where common.py is
    from common import new_parser, parse, ...

and so runs from any folder, by absolute path, under torchrun and in worker processes, without being installed.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import random
import re
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from errors import let_the_first_speak, one_sentence
from paths import RESULTS, atomic_path, check_writable, display_path

if TYPE_CHECKING:  # torch and matplotlib take seconds to import, so the functions that need them do it: download.py does not
    from matplotlib.figure import Figure

# ---- flags -----------------------------------------------------------------------------------------------------------


class CourseParser(argparse.ArgumentParser):
    """argparse with the course's single-hyphen flags and errors of one line."""

    def error(self, message: str):
        let_the_first_speak()
        self.exit(2, f"{self.prog}: error: {message} (-h shows all flags)\n")

    def refuse_unknown(self, words: list[str]) -> None:
        """Name the nearest flag for one that does not exist; argparse would take any beginning of a flag for the flag."""
        for flag in (word.split("=")[0] for word in words if re.match(r"-[A-Za-z]", word)):
            if flag not in self._option_string_actions:
                near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                self.error(f"there is no flag {flag}{f', did you mean {near[0]}?' if near else ''}")


def new_parser(doc: str, computes: bool = True) -> CourseParser:
    """Parser with a module's docstring as help and the flags that mean the same in every script.

    computes=False leaves out the flags about devices and figures, for the scripts that only fetch or draw data.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CourseParser(description=doc, formatter_class=formatter, allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "-help", action="help", help="show this text")
    parser.add_argument("-seed", type=seed, default=0, help="seed of everything random (default: 0)")
    if computes:
        parser.add_argument("-device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where tensors live (default: auto)")
        parser.add_argument("-num_threads", type=thread_count, help="threads of torch's operations (default: torch's own choice)")
        parser.add_argument("-quick", action="store_true", help="small sizes, to see that it runs; the figures mean little")
        parser.add_argument("-show", action="store_true", help="open figures in a window as well as saving them")
    return parser


def parse(parser: CourseParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse in any spelling (-num_workers, --num_workers, --num-workers), then set seed, threads, device and error texts."""
    words = [course_spelling(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser.refuse_unknown(words)
    args = parser.parse_args(words)
    sys.excepthook = one_sentence
    # a Windows console may lack a character, which must not end a run; `| tee` shall show lines as they come
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    if "device" in args:
        prepare_torch(parser, args)
        check_writable(RESULTS)
    return args


def prepare_torch(parser: CourseParser, args: argparse.Namespace) -> None:
    """Turn args.device into a torch.device, refusing one that is not here; set seed, threads and matplotlib's backend."""
    import matplotlib
    import torch

    seed_everything(args.seed)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    if not args.show:
        matplotlib.use("Agg")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(name for name in available if available[name])
    if not available[args.device]:
        parser.error(f"argument -device: {args.device} is not available here; available: {', '.join(k for k in available if available[k])}")
    args.device = torch.device(args.device)


def course_spelling(word: str) -> str:
    """--num-workers=4 -> -num_workers=4; values, negative numbers included, stay as they are."""
    flag = re.fullmatch(r"--?([A-Za-z][\w-]*)(=.*)?", word, flags=re.DOTALL)
    return f"-{flag[1].replace('-', '_')}{flag[2] or ''}" if flag else word


def positive_int(text: str) -> int:
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    return _whole_number(text, 0)


def thread_count(text: str) -> int:
    """The type of a flag that says how many threads: more than a system starts would end in a crash."""
    return _whole_number(text, 1, 1024)


def positive_number(text: str) -> float:
    with contextlib.suppress(ValueError):  # no number
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a number above 0 is expected")


def share(text: str) -> float:
    with contextlib.suppress(ValueError):  # no number
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a share between 0 and 1 is expected")


def share_above_0(text: str) -> float:
    return share(text) or positive_number(text)  # which refuses the 0


def seed(text: str) -> int:
    return _whole_number(text, 0, 2**32 - 1)  # NumPy takes no larger one


def _whole_number(text: str, smallest: int, largest: int = 2**63 - 1) -> int:
    if not re.fullmatch(r"[+-]?\d+", text) or not smallest <= int(text) <= largest:
        upper = f" and at most {largest}" if largest < 2**63 - 1 else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a whole number of at least {smallest}{upper} is expected")
    return int(text)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, so that a run repeats."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---- output ----------------------------------------------------------------------------------------------------------


def print_table(rows: list[dict]) -> None:
    """Print rows as one aligned table: numbers to the right with four significant digits, a missing value as '-'."""
    if not rows:
        return
    header = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in header] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(header, *cells, strict=True)]
    left = [all(isinstance(row.get(key), str | None) for row in rows) for key in header]
    for line in [header, ["-" * width for width in widths], *cells]:
        columns = zip(line, widths, left, strict=True)
        print("  ".join(text.ljust(width) if to_left else text.rjust(width) for text, width, to_left in columns).rstrip())


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def save_results(file: str, args: argparse.Namespace, rows: list[dict]) -> Path:
    """Write rows, flags, machine and versions to results/<script>.json; `file` is the script's __file__."""
    from machine import machine_facts, versions

    path = RESULTS / f"{Path(file).stem}.json"
    content = {
        "script": Path(file).name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(args.device),
        "versions": versions(),
        "flags": vars(args),
        "rows": rows,
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"wrote {display_path(path)}")
    return path


def save_figure(figure: Figure, file: str, name: str, args: argparse.Namespace, note: str = "") -> Path:
    """Write results/<script>_<name>.png with machine, versions and `note` (what n is) in the footer; show it with -show."""
    import matplotlib
    import matplotlib.pyplot as plt

    from machine import machine_facts, versions

    path = RESULTS / f"{Path(file).stem}_{name}.png"
    machine, packages = machine_facts(args.device), versions()
    footer = f"{machine['cpu']}, {machine['usable_cpus']} usable CPUs, {machine['device']}; torch {packages['torch']}; {note}".rstrip("; ")
    figure.text(0.01, 0.005, textwrap.fill(footer, 110), fontsize=6, color="grey", va="bottom")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    print(f"wrote {display_path(path)}")
    if args.show and matplotlib.get_backend().lower() == "agg":
        print("-show: there is no screen here; open the file instead")
    elif args.show:
        plt.show()
    plt.close(figure)
    return path
