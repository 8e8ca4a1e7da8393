"""`casemate completion`: a script for the shell, which asks this program for live words."""

import click

from casemate_cli import term


@click.command()
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script for a shell; verbs, options, kinds and the names of live objects.

    \b
    bash: eval "$(casemate completion bash)"   # in ~/.bashrc
    zsh:  eval "$(casemate completion zsh)"   # in ~/.zshrc
    fish: casemate completion fish > ~/.config/fish/completions/casemate.fish
    """
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    assert completer is not None
    root = ctx.find_root().command
    term.out(completer(root, {}, "casemate", "_CASEMATE_COMPLETE").source())
