"""PURE. The protocol of a host's stream, both ends of it, as two state machines on values.

Theory of operation. A *session* is one stream: the agent says Hello, the manager Welcome (or Rejected), and from then
on desired state flows down and facts flow up until one of the two breaks it off. Neither end does I/O: a shell hands in
what arrived (`receive`), which returns what it means, and after anything that may have made messages takes those to be
sent (`take`), in order. What `receive` raises (`ProtocolError`) ends the session.

Rules, each tested in tests/wire/test_session.py against streams that are cut, delayed and superseded at any point:

- *Level-triggered.* Desired records and facts are whole. While the other side gives no credit they are not queued but
  merged, the last one of an instance wins; so each end holds at most one record an instance, however slow the other is.
- *Transfers.* A desired state too large for one message goes as parts; the host's end delivers it when the last part is
  there, so a half-told snapshot never ends an instance.
- *Revisions and epochs.* Both only grow. The host's end refuses a manager of an older epoch (fencing) and drops desired
  state that is older than what it delivered. A resume by revision is granted only within one epoch; a new term of the
  manager tells the whole state, for its store may have been restored from an older copy.
- *Ack after durable.* `persisted` makes the Ack, and the shell calls it after its fsync.
- *Barrier.* Messages of a stream arrive in order, so a FactsAck for sequence n says that everything that the host sent
  before those facts was taken as well. Events and outcomes stay in the `Outbox`, which outlives sessions, until a
  barrier behind them is acknowledged; the manager knows repeats by their id.
- *Credit.* Each end may send only as many counted messages (`COUNTED`) as the other has granted; grants follow what the
  shell says it consumed. More than granted is a violation. Hello, Welcome, acks, credit, Rejected and Bye are not
  counted: there are at most as many as counted messages.
- *Session counter.* On the agent's disk, raised and fsynced before each dial (`next_counter`). `admit` decides: a newer
  one supersedes a half-open older stream; an older one is stale; the same one again is a cloned identity.
"""

from casemate_wire.session.admission import Admission, admit, next_counter, resumable
from casemate_wire.session.common import (
    COUNTED,
    ONCE_LIMIT,
    OUTBOX_LIMIT,
    PART_CHARACTERS,
    PART_RECORDS,
    WINDOW,
    Busy,
    ProtocolError,
)
from casemate_wire.session.host import HostEnd, HostInput, Outbox, Refused
from casemate_wire.session.manager import ManagerEnd, ManagerInput

__all__ = [
    "COUNTED",
    "ONCE_LIMIT",
    "OUTBOX_LIMIT",
    "PART_CHARACTERS",
    "PART_RECORDS",
    "WINDOW",
    "Admission",
    "Busy",
    "HostEnd",
    "HostInput",
    "ManagerEnd",
    "ManagerInput",
    "Outbox",
    "ProtocolError",
    "Refused",
    "admit",
    "next_counter",
    "resumable",
]
