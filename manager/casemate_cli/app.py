"""The verbs of `casemate`: names and one-line help, each verb's module imported when it is called for."""

import importlib
from typing import Final

import click

#: Verb → (module under casemate_cli.verbs, attribute, one-line help). Groups of `--help` in this order.
VERBS: Final[dict[str, dict[str, tuple[str, str, str]]]] = {
    "Objects": {
        "apply": ("apply", "apply", "Make or change objects from files, a folder, or standard input."),
        "diff": ("apply", "diff", "Show what apply would change; exit 3 if anything."),
        "get": ("get", "get", "Show objects as a table, JSON, YAML, names, or by a path."),
        "describe": ("describe", "describe", "Tell the story of an object."),
        "explain": ("explain", "explain", "Document a kind or a field."),
        "edit": ("edit", "edit", "Change an object in an editor."),
        "label": ("label", "label", "Set or remove labels."),
        "annotate": ("label", "annotate", "Set or remove annotations: free text, by which nothing is selected."),
        "delete": ("delete", "delete", "End objects."),
        "wait": ("wait", "wait", "Wait until objects are as you want them."),
    },
    "Environments": {
        "start": ("run", "start", "Start the instances of environments."),
        "stop": ("run", "stop", "Stop the instances of environments; disks stay."),
        "restart": ("operate", "restart", "End the process of instances and start a new one; disks stay."),
        "reboot": ("operate", "reboot", "Ask guests to boot anew, within the process that they run in."),
        "reset": ("operate", "reset", "Press the reset button of guests, without asking them."),
        "pause": ("run", "pause", "Freeze the guests of environments where they stand, in memory."),
        "resume": ("run", "resume", "Let the frozen guests of environments go on."),
        "rebuild": ("operate", "rebuild", "Give instances a new root disk, made from their image."),
        "migrate": ("operate", "migrate", "Move a running instance to another host; its guest goes on."),
        "certify": ("certify", "certify", "Measure the latency in guests, as a certificate of it."),
        "logs": ("logs", "logs", "Show what a container wrote."),
        "exec": ("exec", "exec_", "Run a command in a container, or with --vm in the VM itself."),
        "console": ("console", "console", "Sit at the serial console of an instance; Ctrl-] leaves."),
        "cp": ("cp", "cp", "Copy a file or a folder to or from a container, or with --vm the VM itself."),
        "ssh": ("ssh", "ssh", "Log in to an instance as root by SSH."),
        "port-forward": ("forward", "port_forward", "Lead local ports to ports of an instance or a pod."),
        "events": ("events", "events", "Show what happened."),
        "audit": ("audit", "audit", "Show what was done, by whom and from where, oldest first."),
        "why": ("why", "why", "Say why an instance is where it is, or is nowhere; exit 2 if nowhere."),
    },
    "Fleet": {
        "host": ("hosts", "host", "See the hosts, let machines join, and revoke them."),
        "gpu": ("gpus", "gpu", "Hold GPUs back, let them out, have them sanitised."),
        "top": ("top", "top", "Show capacity: what is used, free, and stranded, and why."),
        "cordon": ("hosts", "cordon", "Place nothing new on hosts."),
        "fsck": ("fsck", "fsck", "Show what is left of somebody on a host, and repair it; exit 3 if anything is."),
        "ca": ("authorities", "ca", "See, follow and retire the authorities that sign certificates."),
        "uncordon": ("hosts", "uncordon", "Let hosts take instances again."),
    },
    "This program": {
        "whoami": ("identity", "whoami", "Say who you are to the manager, and what you may do."),
        "key": ("identity", "key", "Access keys of programs: make, list, rotate, disable."),
        "token": ("identity", "token", "Print a token of the service account USER that ends by itself, for a CI job."),
        "dev": ("dev", "dev", "A private fleet on this machine."),
        "context": ("context", "context", "Name managers, and choose one."),
        "completion": ("completion", "completion", "Print a completion script for a shell."),
        "support-bundle": ("support", "support_bundle", "Write one file with what helps to find out what is wrong."),
        "version": ("version", "version", "Show versions of this program and of the manager."),
    },
}


class Verbs(click.Group):
    """A group that knows its commands by name, and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for family in VERBS.values() for name in family]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for family in VERBS.values():
            if cmd_name in family:
                module, attribute, _ = family[cmd_name]
                command: click.Command = getattr(importlib.import_module(f"casemate_cli.verbs.{module}"), attribute)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, family in VERBS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, _, text) in family.items()], col_max=14)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (
            args
            and not args[0].startswith("-")
            and self.get_command(ctx, args[0]) is None
            and not ctx.resilient_parsing
        ):
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), 1, 0.6)
            ctx.fail(f"there is no verb {args[0]!r}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from casemate_cli.verbs.version import client_version

        click.echo(f"casemate {client_version()}")
        ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 ok, 1 error, 2 unschedulable, 3 difference found, 4 not found, 5 denied, 6 timeout, "
    "7 conflict, 8 unreachable.",
)
@click.option(
    "--manager", metavar="HOST:PORT", help="Manager to talk to. [env: CASEMATE_MANAGER; default: 127.0.0.1:7443]"
)
@click.option("--context", metavar="NAME", help="Context of the configuration file to use.")
@click.option("--tenant", metavar="NAME", help="Tenant to speak for. [env: CASEMATE_TENANT; default: default]")
@click.option("--request-timeout", type=float, metavar="SECONDS", help="Longest time for one call. [default: 30]")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def root(
    ctx: click.Context, manager: str | None, context: str | None, tenant: str | None, request_timeout: float | None
) -> None:
    """Run container pods inside virtual machines, on a fleet of hosts.

    Data goes to standard output, talk to standard error. `casemate VERB --help` tells more about a verb, and
    `casemate explain environment` documents what you can write in a manifest.
    """
    from casemate_wire.tls import only_tls13

    only_tls13()  # before any verb loads gRPC, whichever way it does
    ctx.obj = {"manager": manager, "context": context, "tenant": tenant, "request_timeout": request_timeout}
