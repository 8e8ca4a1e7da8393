"""The manager of a fleet. Importing it holds gRPC's TLS to version 1.3, before anything loads gRPC."""

from casemate_wire.tls import only_tls13

only_tls13()
