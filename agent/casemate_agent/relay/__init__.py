"""The two halves of a split agent: the socket between them, and the half that has the network."""
