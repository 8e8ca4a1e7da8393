"""GPUs ⇄ messages: what hosts say of them, what operators ask, and what is shown of both."""

import math
from collections.abc import Collection
from dataclasses import fields

from casemate_core.errors import CallerError
from casemate_core.gpu import Check, GpuFigures, GpuOrder, GpuPhase, GpuState, GpuVerb, Passport, Result, Rung, Step
from casemate_core.quantity import format_mib
from casemate_core.spec.views import GpuView
from casemate_wire.codec.basics import meta_to_message, seconds, timestamp
from casemate_wire.v1 import fleet_pb2, gpus_pb2, hosts_pb2

#: Bounds of what a host may say of one GPU.
MOST_STEPS = 16
MOST_CHECKS = 64
MOST_REASONS = 16
MOST_GPUS = 64


class BadGpu(CallerError):
    """What a host says of a GPU does not have its shape."""

    reason = "BadMessage"


def _text(value: str, limit: int = 1024) -> str:
    if len(value) > limit or "\0" in value:
        raise BadGpu(f"text of {len(value)} characters, at most {limit} are taken")
    return value


def _uuid(value: str) -> str:
    if not 0 < len(value) <= 128 or not value.isascii() or not value.isprintable() or " " in value:
        raise BadGpu("a GPU's UUID is 1 to 128 printable characters without spaces")
    return value


def _most(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise BadGpu(f"{count} {what}, at most {limit} are taken")


def passport_to_message(passport: Passport) -> gpus_pb2.GpuPassport:
    """One hand-over."""
    return gpus_pb2.GpuPassport(
        uuid=passport.uuid,
        generation=passport.generation,
        climb=passport.climb,
        tenant=passport.tenant,
        clean=passport.clean,
        reason=passport.reason,
        not_proven=passport.not_proven,
        steps=[
            gpus_pb2.GpuStep(
                rung=step.rung,
                result=step.result,
                evidence=step.evidence,
                started=timestamp(step.at_s),
                took_s=step.took_s,
                checks=[gpus_pb2.GpuCheck(name=c.name, result=c.result, evidence=c.evidence) for c in step.checks],
            )
            for step in passport.steps
        ],
    )


def passport_from_message(message: gpus_pb2.GpuPassport) -> Passport:
    """One hand-over. Raises BadGpu, or ValueError for a word that is not known."""
    _most(len(message.steps), MOST_STEPS, "steps of a passport")
    steps = []
    for step in message.steps:
        _most(len(step.checks), MOST_CHECKS, "checks of a step")
        checks = tuple(Check(_text(c.name, 64), Result(c.result), _text(c.evidence)) for c in step.checks)
        steps.append(
            Step(
                Rung(step.rung),
                Result(step.result),
                _text(step.evidence),
                seconds(step.started),
                max(0.0, step.took_s),
                checks,
            )
        )
    return Passport(
        uuid=_uuid(message.uuid),
        generation=message.generation,
        tenant=_text(message.tenant, 63),
        steps=tuple(steps),
        clean=message.clean,
        reason=_text(message.reason),
        climb=message.climb,
    )


_PLAIN_FIGURES = tuple(f.name for f in fields(GpuFigures) if f.name not in ("told_by", "at_s"))


def figures_to_message(figures: GpuFigures) -> gpus_pb2.GpuFigures:
    """What was read of a GPU; what is unknown is not set."""
    told = {name: value for name in _PLAIN_FIGURES if (value := getattr(figures, name)) is not None}
    return gpus_pb2.GpuFigures(told_by=figures.told_by, time=timestamp(figures.at_s), **told)


def figures_from_message(message: gpus_pb2.GpuFigures) -> GpuFigures:
    """What was read of a GPU. Raises BadGpu."""
    told = {name: getattr(message, name) for name in _PLAIN_FIGURES if message.HasField(name)}  # type: ignore[arg-type]
    if not all(math.isfinite(value) for value in told.values()):
        raise BadGpu("a figure of a GPU is no number")
    return GpuFigures(told_by=_text(message.told_by, 16), at_s=seconds(message.time), **told)


def state_to_message(state: GpuState) -> hosts_pb2.GpuFacts:
    """What a host says of a GPU."""
    return hosts_pb2.GpuFacts(
        uuid=state.uuid,
        phase=state.phase,
        owner=state.owner,
        tenant=state.tenant,
        reason=state.reason,
        generation=state.generation,
        since=timestamp(state.since_s),
        address=state.address,
        driver=state.driver,
        health=state.health,
        reasons=state.reasons,
        order=state.order,
        passport=passport_to_message(state.passport) if state.passport is not None else None,
        figures=figures_to_message(state.figures) if state.figures is not None else None,
    )


def state_from_message(message: hosts_pb2.GpuFacts) -> GpuState:
    """What a host says of a GPU. Raises BadGpu, or ValueError for a word that is not known."""
    _most(len(message.reasons), MOST_REASONS, "reasons of a judgement")
    uuid = _uuid(message.uuid)
    passport = passport_from_message(message.passport) if message.HasField("passport") else None
    if passport is not None and passport.uuid != uuid:
        raise BadGpu("the passport of another GPU")
    return GpuState(
        uuid=uuid,
        phase=GpuPhase(message.phase),
        owner=_text(message.owner, 64),
        tenant=_text(message.tenant, 63),
        reason=_text(message.reason),
        generation=message.generation,
        since_s=seconds(message.since),
        address=_text(message.address, 32),
        driver=_text(message.driver, 64),
        health=_text(message.health, 16),
        reasons=tuple(_text(reason) for reason in message.reasons),
        order=_text(message.order, 64),
        passport=passport,
        figures=figures_from_message(message.figures) if message.HasField("figures") else None,
    )


def states_from_messages(messages: Collection[hosts_pb2.GpuFacts]) -> tuple[GpuState, ...]:
    """What a host says of all its GPUs. Raises as `state_from_message`."""
    _most(len(messages), MOST_GPUS, "GPUs of a host")
    return tuple(map(state_from_message, messages))


def order_to_message(order: GpuOrder) -> hosts_pb2.GpuOrder:
    """What an operator asked."""
    return hosts_pb2.GpuOrder(gpu=order.uuid, uid=order.uid, verb=order.verb, reason=order.reason)


def order_from_message(message: hosts_pb2.GpuOrder) -> GpuOrder:
    """What an operator asked. Raises BadGpu, or ValueError for a verb that is not known."""
    return GpuOrder(_uuid(message.gpu), _text(message.uid, 64), GpuVerb(message.verb), _text(message.reason))


def view_to_message(view: GpuView) -> fleet_pb2.GPU:
    """A GPU as it is shown."""
    state = view.state
    return fleet_pb2.GPU(
        api_version="casemate/v1",
        kind="GPU",
        metadata=meta_to_message(view.meta),
        status=fleet_pb2.GPUStatus(
            host=view.host,
            model=view.model,
            uuid=view.meta.name,
            pci_address=view.address,
            phase=view.phase,
            instance=view.instance,
            memory=format_mib(view.memory_mib) if view.memory_mib else "",
            reason=view.reason,
            tenant=view.tenant,
            driver=state.driver if state else "",
            health=state.health if state else "unknown",
            health_reasons=state.reasons if state else (),
            since=timestamp(state.since_s) if state else None,
            order=view.order,
            passports=[passport_to_message(p) for p in reversed(view.passports)],
            slices=[fleet_pb2.GpuSlice(instance=s.instance, share=s.share, milli=s.milli) for s in view.slices],
            figures=figures_to_message(state.figures) if state is not None and state.figures is not None else None,
        ),
    )
