"""Entry of `casemate`: runs a verb, and turns what went wrong into text and an exit code. Nowhere else is that done."""

import os
import sys

import click

from casemate_cli import term
from casemate_cli.app import root
from casemate_cli.failure import Exit, Failure, lines


def tell(failure: Failure) -> None:
    """The failure on standard error, in the one shape of `failure.lines`."""
    first, *rest = lines(failure)
    term.say(first, "red")
    for line in rest:
        term.say(line)


def usage(error: click.ClickException) -> Failure:
    """A wrong command line in the shape of every other error."""
    remedy = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        remedy = f"see {error.ctx.command_path} --help"
    return Failure(error.format_message().rstrip("."), remedy=remedy)


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        result = root.main(args=arguments, prog_name="casemate", standalone_mode=False)
        term.flush()
        return result if isinstance(result, int) else Exit.OK
    except Failure as failure:
        tell(failure)
        return failure.code
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return Exit.ERROR
    except click.ClickException as error:
        tell(usage(error))
        return Exit.ERROR
    except (KeyboardInterrupt, click.Abort):
        term.say("interrupted")
        return Exit.INTERRUPTED
    except term.ReaderGone:
        # Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK


def main() -> None:
    """The console script."""
    try:
        code = run()
    except KeyboardInterrupt:
        # Ctrl-C may arrive while another end is being told.
        term.say("interrupted")
        code = Exit.INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
