"""The way to the manager: the stream of desired state and facts, and the channels that are dialled back."""
