"""Who this host is to its manager: its key and certificate, how they are asked for, and how they are kept fresh."""
