"""`casemate`, the command line of operators and tenants.

It talks gRPC to a manager and to nobody else, and imports only the schema (`casemate_wire`), the vocabulary
(`casemate_core`) and third-party packages. What lives here: verbs (`verbs/`, one file per family), the private fleet of a
developer (`dev/`), and what all verbs share: the connection (`client`), the settings (`settings`), the table of kinds
(`kinds`), how objects are shown (`columns`, `output`, `plain`), how errors are told (`failure`) and the terminal (`term`).

Theory of operation. A verb is imported when it is called for; gRPC and protobuf are imported when the first call is made;
so `casemate --help` costs an interpreter and click. Standard output carries data alone, standard error carries talk.
Every error becomes a `failure.Failure` at the border where it arises, and only `__main__` turns failures into text and an
exit code.
"""
