"""python -m esd_peft.study make|analyse: a blinded rating page for people, and what their answers say."""

import shlex
import sys

from esd_peft.errors import UserError
from esd_peft.io.terminal import say
from esd_peft.options.command_line import parse, run_command
from esd_peft.options.study import AnalyseStudyConfig, MakeStudyConfig
from esd_peft.study.analyse import analyse_study, study_table
from esd_peft.study.make import KEY, PAGE, make_study

USAGE = """usage: python -m esd_peft.study make     write a blinded rating page (--help lists the options)
       python -m esd_peft.study analyse  what the answers say (--help lists the options)"""


def _make(argv: list[str]) -> None:
    config = parse(MakeStudyConfig, "python -m esd_peft.study make", argv)
    record = make_study(config)
    say(f"{len(record['items'])} images of {len(config.condition)} conditions")
    say(f"{config.output / PAGE} goes to the raters; keep {config.output / KEY} to yourself. When they have sent answers:")
    key = shlex.quote(str(config.output / KEY))
    say(f"  python -m esd_peft.study analyse --key {key} --answers FILE.csv --answers FILE.csv ...")


def _analyse(argv: list[str]) -> None:
    say(study_table(analyse_study(parse(AnalyseStudyConfig, "python -m esd_peft.study analyse", argv))))


def main() -> None:
    """The command line."""
    job = sys.argv[1] if len(sys.argv) > 1 else None
    if job in ("--help", "-h"):
        print(USAGE)
    elif job == "make":
        _make(sys.argv[2:])
    elif job == "analyse":
        _analyse(sys.argv[2:])
    else:
        raise UserError("say make or analyse: python -m esd_peft.study make --help lists the options")


if __name__ == "__main__":
    run_command(main)
