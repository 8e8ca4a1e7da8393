"""What the agent remembers: the records, the files that they are kept in, and the witness of the manager's audit chain."""
